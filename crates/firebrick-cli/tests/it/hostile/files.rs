//! Damaged files, each made from a valid one by one change.

use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::gguf::{Array, Metadata, Strings};
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, Value, write_gguf};
use serde_json::{Value as Json, json};

use super::{Case, Files, Odd, Reader, Valid};

/// Tensors with their bytes.
type Tensors = Vec<(TensorSpec, Vec<u8>)>;

pub(super) fn cases(valid: &Valid) -> Vec<Case> {
    let mut cases = Vec::new();
    gguf_bytes(valid, &mut cases);
    gguf_values(valid, &mut cases);
    safetensors(valid, &mut cases);
    configuration(valid, &mut cases);
    tokenizer(valid, &mut cases);
    shards(valid, &mut cases);
    adapters(valid, &mut cases);
    importances(valid, &mut cases);
    cases
}

/// An importance matrix in the old format, of one weight with 16 inputs.
pub(super) fn importance() -> Vec<u8> {
    let name = b"blk.0.attn_q.weight";
    let mut bytes = Vec::new();
    bytes.extend(1i32.to_le_bytes());
    bytes.extend((name.len() as i32).to_le_bytes());
    bytes.extend(name);
    bytes.extend(1i32.to_le_bytes());
    bytes.extend(16i32.to_le_bytes());
    (0..16).for_each(|i| bytes.extend((i as f32).to_le_bytes()));
    bytes
}

fn importances(valid: &Valid, cases: &mut Vec<Case>) {
    let good = importance();
    let count = 4 + 4 + 19 + 4;
    let mut bad = |bytes: Vec<u8>, says: &str| {
        let line = "convert m out.gguf --type q4_0 --imatrix i.dat";
        let case =
            Case::line(format!("i.dat #{} ({says})", cases.len()), line, &valid.folder, &["i.dat", says]);
        cases.push(case.with("i.dat", bytes));
    };
    for end in [0, 3, 6, 20, 30, count + 2, good.len() - 1] {
        bad(good[..end].to_vec(), "byte");
    }
    bad(patched(&good, 0, &(-1i32).to_le_bytes()), "byte 0");
    bad(patched(&good, 0, &0i32.to_le_bytes()), "no importances");
    bad(patched(&good, 0, &i32::MAX.to_le_bytes()), "byte");
    bad(patched(&good, 4, &0i32.to_le_bytes()), "name");
    bad(patched(&good, 4, &i32::MAX.to_le_bytes()), "byte 4");
    bad(patched(&good, 8, b"\xff"), "UTF-8");
    bad(patched(&good, count, &i32::MAX.to_le_bytes()), "byte");
    bad(patched(&good, count, &(-1i32).to_le_bytes()), "byte");
    bad(patched(&good, count + 4, &f32::NAN.to_le_bytes()), "blk.0.attn_q.weight");
    bad(patched(&good, count + 4, &(-1f32).to_le_bytes()), "blk.0.attn_q.weight");
    bad([&good[..], b"more"].concat(), "byte");
    bad(valid.gguf["m.gguf"].clone(), ".in_sum2");
    bad(b"GGUF".to_vec(), "byte");
}

fn position(bytes: &[u8], needle: &[u8]) -> usize {
    bytes.windows(needle.len()).position(|w| w == needle).expect("the valid file has it")
}

fn patched(bytes: &[u8], at: usize, patch: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + patch.len()].copy_from_slice(patch);
    bytes
}

/// One more case of a model at `model`, with `path` replaced.
fn add(
    cases: &mut Vec<Case>,
    reader: Reader,
    model: &str,
    base: &Files,
    path: &str,
    bytes: Vec<u8>,
    says: &[&str],
) {
    let name = format!("{path} #{} ({})", cases.len(), says.last().unwrap_or(&""));
    cases.push(Case::new(name, reader.arguments(cases.len(), model), base, says).with(path, bytes));
}

/// Cuts, counts, lengths and types of a GGUF file, byte by byte.
fn gguf_bytes(valid: &Valid, cases: &mut Vec<Case>) {
    let good = &valid.gguf["m.gguf"];
    let mut bad = |bytes: Vec<u8>, says: &[&str]| {
        let says = [&["m.gguf"], says].concat();
        add(cases, Reader::Open, "m.gguf", &valid.gguf, "m.gguf", bytes, &says);
    };
    let after = |needle: &str| position(good, needle.as_bytes()) + needle.len();
    let huge = [u64::MAX, 1 << 63, 1 << 40];

    let architecture = after("general.architecture");
    let tokens = after("tokenizer.ggml.tokens");
    let table = position(good, b"token_embd.weight");
    for (cut, says) in [
        (0, "at byte 0"),
        (3, "at byte 0"),
        (4, "at byte 4"),
        (7, "at byte 4"),
        (8, "at byte 8"),
        (15, "at byte 8"),
        (20, "at byte 16"),
        (24, "the file has room for at most"),
        (architecture - 3, "room for at most"),
        (architecture + 2, "room for at most"),
        (tokens + 4, "expected"),
        (tokens + 40, "array elements"),
        (table - 4, "bytes expected"),
        (table + 20, "expected"),
        (good.len() / 2, "in a file of"),
        (good.len() - 64, "in a file of"),
    ] {
        bad(good[..cut].to_vec(), &[says]);
    }
    bad(patched(good, 0, b"GGML"), &["at byte 0", "starts with `GGUF`"]);
    bad(patched(good, 0, &[0; 4]), &["at byte 0"]);
    bad(patched(good, 4, &1u32.to_le_bytes()), &["at byte 4", "version 1"]);
    bad(patched(good, 4, &4_000_000_000u32.to_le_bytes()), &["at byte 4", "version 4000000000"]);
    bad(patched(good, 4, &3u32.to_be_bytes()), &["at byte 4", "big-endian"]);
    for count in huge {
        bad(patched(good, 8, &count.to_le_bytes()), &["at byte 8", "tensors"]);
        bad(patched(good, 16, &count.to_le_bytes()), &["at byte 16", "metadata keys"]);
        bad(patched(good, 24, &count.to_le_bytes()), &["at byte 24", "a string of"]);
        bad(patched(good, tokens + 8, &count.to_le_bytes()), &["at byte", "array elements"]);
    }
    bad(patched(good, 8, &0u64.to_le_bytes()), &["token_embd.weight"]);
    bad(patched(good, 16, &0u64.to_le_bytes()), &["at byte"]);
    bad(patched(good, architecture, &13u32.to_le_bytes()), &["unknown metadata type 13"]);
    bad(patched(good, tokens + 4, &77u32.to_le_bytes()), &["unknown metadata type 77"]);
    bad(patched(good, tokens + 4, &9u32.to_le_bytes()), &["at byte"]);
    bad(patched(good, 32, &[0xff, 0xfe]), &["at byte 32", "not UTF-8"]);
    bad(patched(good, 32, &[0, 27]), &["general.architecture"]);
    bad(patched(good, table, &[0xc3, 0x28]), &["not UTF-8"]);
    bad(patched(good, table, b"\x1b[2J\0"), &["token_embd.weight"]);
    let (k, q) = (position(good, b"blk.0.attn_k.weight"), b"blk.0.attn_q.weight");
    bad(patched(good, k, q), &["`blk.0.attn_q.weight` appears twice"]);

    // Behind the name of a tensor: the number of extents, the extents, the type, the offset.
    let dims = k + q.len();
    bad(patched(good, dims, &5u32.to_le_bytes()), &["attn_k.weight` has 5 dims"]);
    bad(patched(good, dims, &u32::MAX.to_le_bytes()), &["attn_k.weight` has 4294967295 dims"]);
    for extent in huge {
        bad(patched(good, dims + 4, &extent.to_le_bytes()), &["attn_k.weight"]);
    }
    bad(patched(good, dims + 20, &12u32.to_le_bytes()), &["attn_k.weight", "q4_k"]);
    bad(patched(good, dims + 20, &999u32.to_le_bytes()), &["attn_k.weight", "ggml type 999"]);
    bad(patched(good, dims + 24, &1u64.to_le_bytes()), &["attn_k.weight", "not a multiple of the alignment"]);
    bad(patched(good, dims + 24, &(u64::MAX - 31).to_le_bytes()), &["attn_k.weight", "in a file of"]);
    bad(patched(good, dims + 24, &(1u64 << 32).to_le_bytes()), &["attn_k.weight", "in a file of"]);
    bad(patched(good, dims + 24, &0u64.to_le_bytes()), &["attn_k.weight", "overlap"]);
    let mut nested =
        [b"GGUF".to_vec(), 3u32.to_le_bytes().to_vec(), vec![0; 8], 1u64.to_le_bytes().to_vec()].concat();
    nested.extend([1u64.to_le_bytes().as_slice(), b"k", &9u32.to_le_bytes()].concat());
    for _ in 0..200_000 {
        nested.extend([9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat());
    }
    bad(nested, &["nested over 64 deep"]);
}

/// Metadata and tensors of a GGUF file that is well-formed.
fn gguf_values(valid: &Valid, cases: &mut Vec<Case>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, &valid.gguf["m.gguf"]).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let metadata = &checkpoint.gguf().unwrap().metadata;
    let tensors: Tensors = checkpoint
        .tensors()
        .iter()
        .map(|t| (t.spec(), checkpoint.bytes(&t.name).unwrap().to_vec()))
        .collect();
    let out = dir.path().join("out.gguf");
    let write = |metadata: &Metadata, tensors: &[(TensorSpec, Vec<u8>)]| {
        write_gguf(&out, metadata, tensors).unwrap();
        std::fs::read(&out).unwrap()
    };
    let texts = |texts: &[&str]| {
        let mut strings = Strings::default();
        texts.iter().for_each(|t| strings.push(t));
        Some(Value::from(Array::String(strings)))
    };
    let changes: Vec<(&str, Option<Value>, &str)> = vec![
        ("general.architecture", None, "general.architecture"),
        ("general.architecture", Some("gpt5".into()), "`gpt5`"),
        ("general.architecture", Some(Value::U32(3)), "general.architecture"),
        ("llama.block_count", None, "llama.block_count"),
        ("llama.block_count", Some(Value::U32(0)), "num_hidden_layers"),
        ("llama.block_count", Some(Value::U32(u32::MAX)), "num_hidden_layers"),
        ("llama.block_count", Some(Value::U64(1 << 40)), "llama.block_count"),
        ("llama.block_count", Some(Value::I32(-1)), "llama.block_count"),
        ("llama.embedding_length", Some(Value::U32(0)), "hidden_size"),
        ("llama.embedding_length", Some(Value::U32(1 << 30)), "hidden_size"),
        ("llama.attention.head_count", Some(Value::U32(0)), "num_attention_heads"),
        ("llama.attention.head_count", Some(Value::U32(3)), "heads"),
        ("llama.attention.key_length", Some(Value::U32(5)), "rotary"),
        ("llama.attention.layer_norm_rms_epsilon", Some(Value::F32(f32::NAN)), "rms_norm_eps"),
        ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon"),
        ("llama.rope.freq_base", Some(Value::F32(f32::NEG_INFINITY)), "rope_theta"),
        ("llama.rope.freq_base", Some("much".into()), "rope.freq_base"),
        ("llama.rope.scaling.type", Some("yarn".into()), "yarn"),
        ("llama.firebrick.norm_placement", Some("peri".into()), "post_attention_norm"),
        ("tokenizer.ggml.model", None, "tokenizer.ggml.model"),
        ("tokenizer.ggml.model", Some("llama".into()), "tokenizer.ggml.scores"),
        ("tokenizer.ggml.pre", Some("nobody".into()), "nobody"),
        ("tokenizer.ggml.tokens", texts(&["a", "a"]), "token"),
        ("tokenizer.ggml.tokens", texts(&[]), "token"),
        ("tokenizer.ggml.tokens", Some(Array::U32(vec![1, 2]).into()), "tokenizer.ggml.tokens"),
        ("tokenizer.ggml.token_type", Some(Array::I32(vec![1]).into()), "1 types"),
        ("tokenizer.ggml.merges", texts(&["ab"]), "merge `ab`"),
        ("tokenizer.ggml.merges", texts(&["zzz qqq"]), "zzz"),
        ("tokenizer.ggml.bos_token_id", Some(Value::U32(u32::MAX)), "bos_token_id"),
        ("tokenizer.ggml.eos_token_id", Some(Value::U32(100_000)), "eos_token_id"),
        ("tokenizer.ggml.eos_token_id", Some("end".into()), "eos_token_id"),
        ("tokenizer.chat_template", Some(Value::Bool(true)), "chat_template"),
    ];
    for (key, value, says) in changes {
        let mut changed = metadata.clone();
        match value {
            Some(value) => drop(changed.insert(key.into(), value)),
            None => drop(changed.shift_remove(key).expect("the valid file has it")),
        }
        let bytes = write(&changed, &tensors);
        add(cases, Reader::Load, "m.gguf", &valid.gguf, "m.gguf", bytes, &["m.gguf", says]);
    }
    let mut bad = |change: &dyn Fn(&mut Tensors), says: &[&str]| {
        let mut changed = tensors.clone();
        change(&mut changed);
        let bytes = write(metadata, &changed);
        add(cases, Reader::Load, "m.gguf", &valid.gguf, "m.gguf", bytes, says);
    };
    let at = |name: &str| tensors.iter().position(|(t, _)| t.name == name).unwrap();
    let (q, norm, embed) = (at("blk.1.attn_q.weight"), at("blk.0.attn_norm.weight"), at("token_embd.weight"));
    bad(&|t| drop(t.remove(q)), &["m.gguf", "blk.1.attn_q.weight", "missing"]);
    bad(&|t| t[q].0.name = "blk.1.attn_qq.weight".into(), &["m.gguf", "blk.1.attn_qq.weight"]);
    bad(&|t| t[q].0.shape.push(1), &["m.gguf", "blk.1.attn_q.weight", "shape"]);
    bad(
        &|t| t[q].0 = TensorSpec::new("blk.1.attn_q.weight", DType::I32, [16, 16]),
        &["m.gguf", "attn_q.weight", "integers"],
    );
    bad(
        &|t| t[norm] = (TensorSpec::new("blk.0.attn_norm.weight", DType::F32, [0]), Vec::new()),
        &["attn_norm"],
    );
    bad(&|t| t[embed].0.shape = vec![272 * 16], &["token_embd.weight"]);
    bad(&|t| t[embed].0.shape = vec![16, 272], &["m.gguf"]);
    bad(
        &|t| t.push((TensorSpec::new("rope_freqs.weight", DType::F32, [1]), vec![0; 4])),
        &["m.gguf", "rope_freqs"],
    );
}

/// A safetensors file of this header and so many bytes of data.
fn safetensors_file(header: &[u8], data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, &vec![0; data]].concat()
}

fn safetensors(valid: &Valid, cases: &mut Vec<Case>) {
    let path = "m/model.safetensors";
    let good = &valid.folder[path];
    let size = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Json> = serde_json::from_slice(&good[8..8 + size]).unwrap();
    let data = good.len() - 8 - size;
    let mut bad = |reader: Reader, bytes: Vec<u8>, says: &[&str]| {
        add(cases, reader, "m", &valid.folder, path, bytes, says);
    };
    let file = "model.safetensors";
    for cut in [0, 5, 8, 9, 8 + size / 2, 8 + size - 1] {
        bad(Reader::Open, good[..cut].to_vec(), &[file, "at byte 0"]);
    }
    for cut in [8 + size, 8 + size + data / 2, good.len() - 1] {
        bad(Reader::Open, good[..cut].to_vec(), &[file, "bytes of data"]);
    }
    for length in [u64::MAX, 1 << 63, 100_000_001, good.len() as u64] {
        bad(Reader::Open, patched(good, 0, &length.to_le_bytes()), &[file, "at byte 0"]);
    }
    bad(Reader::Open, patched(good, 0, &0u64.to_le_bytes()), &[file, "at byte 8"]);
    bad(Reader::Open, patched(good, 0, &(size as u64 - 9).to_le_bytes()), &[file]);
    bad(Reader::Open, patched(good, 8, b"["), &[file, "at byte 8"]);
    bad(Reader::Open, [good.clone(), vec![0; 3]].concat(), &[file, "3 bytes after the last tensor"]);
    for text in ["{\"a\":", "{\"a\":[", "[", "{\"__metadata__\":{\"a\":"] {
        bad(Reader::Open, safetensors_file(text.repeat(100_000).as_bytes(), 0), &[file, "at byte"]);
    }
    let text = String::from_utf8(good[8..8 + size].to_vec()).unwrap();
    let edit = |from: &str, to: &[u8]| {
        let at = position(text.as_bytes(), from.as_bytes());
        let header = [&text.as_bytes()[..at], to, &text.as_bytes()[at + from.len()..]].concat();
        [&(header.len() as u64).to_le_bytes()[..], &header, &good[8 + size..]].concat()
    };
    bad(Reader::Open, edit("\"model.norm.weight\"", b"\"model.norm\xff\xfe\""), &[file, "at byte"]);
    bad(Reader::Open, edit("\"model.norm.weight\"", b"\"model.norm\0weight\""), &[file, "at byte"]);
    bad(Reader::Load, edit("model.norm.weight", b"\\u0000\\u001b[2J"), &["m: ", "no place"]);
    bad(Reader::Open, edit("model.norm.weight", b"lm_head.weight"), &[file, "appears twice"]);
    bad(Reader::Open, edit("\"__metadata__\":{", b"\"__metadata__\":{\"x\":5,"), &[file, "at byte"]);
    bad(Reader::Open, edit("\"F32\"", b"\"F8_E4M3\""), &[file, "F8_E4M3"]);
    bad(Reader::Open, edit("\"F32\"", b"7"), &[file, "at byte"]);
    bad(Reader::Open, edit("\"F32\"", b"\"F64\""), &[file, "does not take"]);

    let mut entry = |reader: Reader, name: &str, change: Json, says: &[&str]| {
        let mut header = header.clone();
        for (key, value) in change.as_object().unwrap() {
            header[name][key] = value.clone();
        }
        let header = serde_json::to_vec(&header).unwrap();
        bad(reader, [&(header.len() as u64).to_le_bytes()[..], &header, &good[8 + size..]].concat(), says);
    };
    let name = "model.layers.1.mlp.up_proj.weight";
    for shape in [json!([-1, 2]), json!([1.5]), json!("many"), json!(null), json!([1e30])] {
        entry(Reader::Open, name, json!({"shape": shape}), &[file, "at byte"]);
    }
    for shape in
        [json!([1u64 << 40, 1u64 << 40]), json!([u64::MAX]), json!([1u64 << 40, 1u64 << 40, 0]), json!([])]
    {
        entry(Reader::Open, name, json!({"shape": shape}), &[file, name]);
    }
    entry(Reader::Load, name, json!({"shape": [16, 32]}), &["m: ", name, "shape"]);
    entry(Reader::Load, name, json!({"shape": [512]}), &["m: ", name, "shape"]);
    entry(Reader::Load, name, json!({"dtype": "I32"}), &["m: ", name, "integers"]);
    for offsets in [json!([0, 4]), json!([8, 4]), json!([0, u64::MAX]), json!([u64::MAX, u64::MAX])] {
        entry(Reader::Open, name, json!({"data_offsets": offsets}), &[file, name]);
    }
    for offsets in [json!([0]), json!([-8, 8]), json!({"from": 0})] {
        entry(Reader::Open, name, json!({"data_offsets": offsets}), &[file, "at byte"]);
    }
    // A hundred thousand empty tensors are a hundred thousand problems and one message.
    let many: serde_json::Map<String, Json> = (0..100_000)
        .map(|i| (format!("t{i}"), json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})))
        .collect();
    bad(Reader::Open, safetensors_file(&serde_json::to_vec(&many).unwrap(), 0), &["m: ", "`t0`", "more"]);
    let mut place = |odd: Odd, says: &[&str]| {
        let case = Case::new(
            format!("{path} {}", says[0]),
            Reader::Open.arguments(cases.len(), "m"),
            &valid.folder,
            says,
        );
        cases.push(case.odd(path, odd));
    };
    place(Odd::Folder, &["m: ", "model.safetensors"]);
    place(Odd::Link("model.safetensors"), &["m: ", "model.safetensors"]);
    place(Odd::Link("/dev/zero"), &["m: ", "model.safetensors"]);
    place(Odd::Pipe, &["m: ", "model.safetensors"]);
}

fn configuration(valid: &Valid, cases: &mut Vec<Case>) {
    let path = "m/config.json";
    let good: Json = serde_json::from_slice(&valid.folder[path]).unwrap();
    let mut bad = |bytes: Vec<u8>, says: &[&str]| {
        add(cases, Reader::Load, "m", &valid.folder, path, bytes, &[&["config.json"], says].concat());
    };
    let text = &valid.folder[path];
    bad(Vec::new(), &["line 1"]);
    bad(text[..text.len() / 2].to_vec(), &["line"]);
    bad(b"[1, 2]".to_vec(), &["not a JSON object"]);
    bad(b"{\"hidden_size\": NaN}".to_vec(), &["line 1"]);
    bad(b"\xff\xfe{}".to_vec(), &["byte 0"]);
    bad(b"{\0}".to_vec(), &["line 1"]);
    bad("[".repeat(1_000_000).into_bytes(), &["line 1"]);
    bad(b"{}".to_vec(), &["vocab_size", "hidden_size"]);
    let mut set = |change: Json, says: &[&str]| {
        let mut config = good.clone();
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        bad(serde_json::to_vec_pretty(&config).unwrap(), says);
    };
    set(json!({"model_type": "gpt5"}), &["gpt5"]);
    set(json!({"model_type": 5}), &["architecture"]);
    set(json!({"vocab_size": 0}), &["vocab_size"]);
    set(json!({"vocab_size": u64::MAX}), &["vocab_size"]);
    set(json!({"hidden_size": -16}), &["hidden_size"]);
    set(json!({"hidden_size": 16.5}), &["hidden_size"]);
    set(json!({"hidden_size": "16"}), &["hidden_size"]);
    set(json!({"num_hidden_layers": 1u64 << 40}), &["num_hidden_layers"]);
    set(json!({"num_attention_heads": 0}), &["num_attention_heads"]);
    set(json!({"num_key_value_heads": 3}), &["heads"]);
    set(json!({"head_dim": 3}), &["head_dim"]);
    set(json!({"max_position_embeddings": 0}), &["max_position_embeddings"]);
    set(json!({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}), &["rope_theta"]);
    set(json!({"rope_scaling": {"rope_type": "nothing-known", "factor": 8}}), &["nothing-known"]);
    set(json!({"rms_norm_eps": 1e300}), &["rms_norm_eps"]);
    set(json!({"hidden_act": "relu6"}), &["relu6"]);
    set(json!({"tie_word_embeddings": 1}), &["tie_word_embeddings"]);
    // Sizes that only the configuration claims: nothing of them is allocated.
    for (change, says) in [
        (json!({"num_hidden_layers": 4096}), "model.layers.2."),
        (json!({"vocab_size": 1 << 22}), "lm_head.weight"),
        (json!({"intermediate_size": 1 << 20}), "mlp.up_proj.weight` has shape"),
        (json!({"hidden_size": 1 << 17, "head_dim": 4096, "num_attention_heads": 4096}), "self_attn.q_proj"),
        (json!({"num_hidden_layers": 1}), "model.layers.1."),
        (json!({"tie_word_embeddings": true}), "lm_head.weight"),
        (json!({"vocab_size": 200}), "rows"),
    ] {
        let mut config = good.clone();
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let bytes = serde_json::to_vec(&config).unwrap();
        add(cases, Reader::Load, "m", &valid.folder, path, bytes, &[says]);
    }
    for (odd, says) in [
        (Odd::Folder, "directory"),
        (Odd::Link("config.json"), "config.json"),
        (Odd::Link("/dev/zero"), "not a regular file"),
        (Odd::Pipe, "not a regular file"),
    ] {
        let arguments = Reader::Open.arguments(cases.len(), "m");
        cases.push(
            Case::new(format!("{path} {says}"), arguments, &valid.folder, &["config.json", says])
                .odd(path, odd),
        );
    }
    cases.push(Case::line("no config.json", "inspect m", &valid.folder, &["config.json"]).without(path));
    cases.push(Case::line("a loop of links", "inspect m", &valid.gguf, &["m"]).odd("m", Odd::Link("m")));
    cases.push(
        Case::line("a pipe for a model", "inspect p.gguf", &valid.gguf, &["p.gguf"]).odd("p.gguf", Odd::Pipe),
    );
    cases.push(Case::line("a file that is text", "inspect t.txt", &valid.gguf, &["t.txt", "at byte"]));
}

fn tokenizer(valid: &Valid, cases: &mut Vec<Case>) {
    let path = "m/tokenizer.json";
    let good: Json = serde_json::from_slice(&valid.folder[path]).unwrap();
    let mut bad = |path: &str, bytes: Vec<u8>, says: &[&str]| {
        add(cases, Reader::Load, "m", &valid.folder, path, bytes, says);
    };
    let file = "tokenizer.json";
    let text = &valid.folder[path];
    bad(path, Vec::new(), &[file, "line 1"]);
    bad(path, text[..text.len() / 3].to_vec(), &[file, "line"]);
    bad(path, "{\"a\":".repeat(500_000).into_bytes(), &[file, "line 1"]);
    bad(path, b"\xff".to_vec(), &[file, "line 1"]);
    for other in ["{}", "[]", "7", "{\"model\": null}", "{\"model\": {\"type\": \"BPE\"}}"] {
        bad(path, other.into(), &[file]);
    }
    let mut set = |pointer: &str, value: Json, says: &[&str]| {
        let mut json = good.clone();
        *json.pointer_mut(pointer).unwrap_or_else(|| panic!("no {pointer}")) = value;
        bad(path, serde_json::to_vec(&json).unwrap(), says);
    };
    set("/model/type", json!("Nothing"), &[file]);
    set("/model/vocab", json!({}), &[file]);
    set("/model/vocab", json!({"a": -1}), &[file]);
    set("/model/vocab", json!({"a": u64::MAX}), &[file]);
    set("/model/merges", json!([["zzzz", "q"]]), &[file, "zzzz"]);
    set("/model/merges", json!(["onlyone"]), &[file, "onlyone"]);
    set("/model/merges", json!(5), &[file]);
    set("/model/dropout", json!(7.5), &[file]);
    set("/added_tokens", json!([{"id": 4_000_000_000u32, "content": "<x>", "special": true}]), &[file]);
    set(
        "/normalizer",
        json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
        &[file, "empty"],
    );
    set("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}), &[file]);
    set("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="}), &[file]);
    set("/normalizer", json!({"type": "Unheard"}), &[file]);
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    set("/pre_tokenizer", split("(("), &[file]);
    set("/pre_tokenizer", split(&"(?:a{1000}){1000}".repeat(3)), &[file]);
    let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}], "pair": [], "special_tokens": {}});
    set("/post_processor", template, &[file, "<no>"]);
    set("/decoder", json!({"type": "Strip", "content": "too long", "start": -1, "stop": 0}), &[file]);

    let (config, generation) = ("m/tokenizer_config.json", "m/generation_config.json");
    bad(config, b"[]".to_vec(), &["tokenizer_config.json", "object"]);
    bad(config, b"{".to_vec(), &["tokenizer_config.json"]);
    bad(config, br#"{"eos_token": "<nowhere>"}"#.to_vec(), &["<nowhere>"]);
    bad(config, br#"{"bos_token": {"content": "\u0007<nowhere>"}}"#.to_vec(), &["<nowhere>"]);
    bad(generation, b"nothing".to_vec(), &["generation_config.json"]);
    bad("m/chat_template.jinja", b"{{ \xff }}".to_vec(), &["chat_template.jinja"]);
    for (odd, says) in [
        (Odd::Folder, "directory"),
        (Odd::Link("tokenizer.json"), file),
        (Odd::Link("/dev/zero"), "not a regular file"),
        (Odd::Pipe, "not a regular file"),
    ] {
        let arguments = Reader::Open.arguments(cases.len(), "m");
        cases.push(
            Case::new(format!("{path} {says}"), arguments, &valid.folder, &[file, says]).odd(path, odd),
        );
    }
    cases.push(Case::line("no tokenizer", "inspect m", &valid.folder, &["m", file]).without(path));
}

fn shards(valid: &Valid, cases: &mut Vec<Case>) {
    let path = "m/model.safetensors.index.json";
    let good: Json = serde_json::from_slice(&valid.sharded[path]).unwrap();
    let map = good["weight_map"].as_object().unwrap();
    let shard = map["model.norm.weight"].as_str().unwrap().to_string();
    let other = map.values().filter_map(Json::as_str).find(|s| **s != shard).unwrap().to_string();
    let mut bad = |path: &str, bytes: Vec<u8>, says: &[&str]| {
        add(cases, Reader::Open, "m", &valid.sharded, path, bytes, says);
    };
    let file = "model.safetensors.index.json";
    bad(path, Vec::new(), &[file, "line 1"]);
    bad(path, b"{\"weight_map\": {\"a\": 5}}".to_vec(), &[file, "line 1"]);
    bad(path, b"{}".to_vec(), &[file, "weight_map"]);
    bad(path, b"{\"weight_map\": {}}".to_vec(), &[file, "no tensors"]);
    bad(path, b"{\"weight_map\": []}".to_vec(), &[file]);
    bad(path, b"{\"weight_map\": {\"\xff\": \"a\"}}".to_vec(), &[file]);
    bad(path, "{\"weight_map\":".repeat(300_000).into_bytes(), &[file]);
    for place in
        ["../m.safetensors", "/etc/passwd", "a/../../b", "..", ".", "", "a\\b", "C:x", "nul\0.safetensors"]
    {
        let mut index = good.clone();
        index["weight_map"]["model.norm.weight"] = place.into();
        bad(path, serde_json::to_vec(&index).unwrap(), &[file, "not a plain file name"]);
    }
    let mut index = good.clone();
    index["weight_map"]["model.norm.weight"] = "model-99999-of-00002.safetensors".into();
    bad(path, serde_json::to_vec(&index).unwrap(), &[file, "model-99999"]);
    index["weight_map"]["model.norm.weight"] = other.as_str().into();
    bad(path, serde_json::to_vec(&index).unwrap(), &[file, "model.norm.weight", &other]);
    let mut index = good.clone();
    index["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
    bad(path, serde_json::to_vec(&index).unwrap(), &[file, "model.norm.weight", "not in the index"]);
    let mut index = good.clone();
    index["weight_map"]["extra"] = shard.as_str().into();
    bad(path, serde_json::to_vec(&index).unwrap(), &[file, "`extra`"]);
    // Another shard's bytes: every tensor is twice or not where it should be.
    let place = format!("m/{shard}");
    bad(&place, valid.sharded[&format!("m/{other}")].clone(), &[file, &shard]);
    bad(&place, valid.sharded[&place][..30].to_vec(), &[file, &shard, "at byte 0"]);
    bad(&place, Vec::new(), &[file, &shard]);
    for (odd, says) in [(Odd::Folder, "file"), (Odd::Pipe, "file"), (Odd::Link("/dev/zero"), "file")] {
        let arguments = Reader::Open.arguments(cases.len(), "m");
        cases.push(
            Case::new(format!("{place} odd"), arguments, &valid.sharded, &[file, &shard, says])
                .odd(&place, odd),
        );
    }
    cases.push(Case::line("a missing shard", "inspect m", &valid.sharded, &[file, &shard]).without(&place));
    cases.push(
        Case::line("index in a loop", "inspect m", &valid.sharded, &["m: "]).odd(path, Odd::Link(file)),
    );
}

fn adapters(valid: &Valid, cases: &mut Vec<Case>) {
    let (path, weights) = ("a/adapter_config.json", "a/adapter_model.safetensors");
    let good: Json = serde_json::from_slice(&valid.adapter[path]).unwrap();
    let mut bad = |path: &str, bytes: Vec<u8>, says: &[&str]| {
        add(cases, Reader::Adapter, "m", &valid.adapter, path, bytes, says);
    };
    let file = "adapter_config.json";
    bad(path, Vec::new(), &[file, "line 1"]);
    bad(path, b"[]".to_vec(), &[file]);
    bad(path, b"{}".to_vec(), &[file, "peft_type"]);
    bad(path, b"\xfe".to_vec(), &[file, "byte 0"]);
    bad(path, "{\"extra\":".repeat(200_000).into_bytes(), &[file, "line 1"]);
    let mut set = |key: &str, value: Json, says: &[&str]| {
        let mut config = good.clone();
        config[key] = value;
        bad(path, serde_json::to_vec(&config).unwrap(), says);
    };
    set("peft_type", json!("PREFIX_TUNING"), &[file, "PREFIX_TUNING"]);
    set("r", json!(0), &[file, "rank 0"]);
    set("r", json!(1u64 << 60), &[file, "rank 1152921504606846976"]);
    set("r", json!(-2), &[file, "line 1"]);
    set("r", json!("two"), &[file, "line 1"]);
    set("lora_alpha", json!("much"), &[file, "line 1"]);
    set("lora_dropout", json!(1.0), &[file, "dropout"]);
    set("lora_dropout", json!(-0.5), &[file, "dropout"]);
    set("use_dora", json!(true), &[file, "use_dora"]);
    set("bias", json!("all"), &[file, "bias"]);
    set("modules_to_save", json!(["embed_tokens"]), &[file, "modules_to_save"]);
    set("rank_pattern", json!({"((": 2}), &[file, "(("]);
    set("rank_pattern", json!({"(?:a{1000}){1000}": 2}), &[file, "pattern"]);
    set("rank_pattern", json!({"q_proj": 1.5}), &[file, "q_proj"]);
    set("alpha_pattern", json!({"q_proj": "x"}), &[file, "q_proj"]);
    let text = String::from_utf8(valid.adapter[path].clone()).unwrap();
    let alpha = text.lines().find(|l| l.contains("\"lora_alpha\"")).unwrap();
    bad(path, text.replace(alpha, "\"lora_alpha\": 1e999,").into_bytes(), &[file]);
    let tensors = &valid.adapter[weights];
    let file = "adapter_model.safetensors";
    bad(weights, tensors[..tensors.len() - 5].to_vec(), &[file, "bytes of data"]);
    bad(weights, patched(tensors, 0, &u64::MAX.to_le_bytes()), &[file, "at byte 0"]);
    bad(weights, valid.folder["m/model.safetensors"].clone(), &["adapter_config.json", "not a LoRA factor"]);
    bad(weights, safetensors_file(b"{}", 0), &["adapter_config.json"]);
    let renamed = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        patched(tensors, position(tensors, from.as_bytes()), to.as_bytes())
    };
    bad(weights, renamed("lora_A", "lora_C"), &["adapter_config.json", "lora_C"]);
    bad(
        weights,
        renamed("layers.1.self_attn.k_proj.lora_A", "layers.7.self_attn.k_proj.lora_A"),
        &["layers.7"],
    );
    for (odd, says) in [
        (Odd::Folder, "directory"),
        (Odd::Pipe, "not a regular file"),
        (Odd::Link("/dev/zero"), "not a regular file"),
    ] {
        let arguments = Reader::Adapter.arguments(cases.len(), "m");
        let case =
            Case::new(format!("{path} {says}"), arguments, &valid.adapter, &["adapter_config.json", says]);
        cases.push(case.odd(path, odd));
    }
    cases.push(Case::line(
        "an adapter that is none",
        "generate --model m --prompt x --adapter t.txt",
        &valid.adapter,
        &["t.txt"],
    ));
    cases.push(Case::line(
        "no adapter",
        "generate --model m --prompt x --adapter b",
        &valid.adapter,
        &["b/adapter_config.json"],
    ));
}
