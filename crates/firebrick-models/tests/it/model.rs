//! Files that say more than the wiring understands, and what a model's digest sees.

use std::path::Path;

use burn::tensor::Device;
use firebrick_core::Seed;
use firebrick_models::tokenizer::train_bpe;
use firebrick_models::{Decoder, DecoderConfig, Export, ExportType, ModelFiles};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, Value, write_gguf, write_safetensors};
use firebrick_tensor::stream::Executor;

const VOCAB: usize = 264;
const TEXT: &str = "the quick brown fox jumps over the lazy dog and the quick brown fox runs on";

/// Writes a small model to `path`.
fn write(path: &Path, tied_head: bool, seed: u64) {
    let tokenizer = train_bpe([TEXT], VOCAB).unwrap();
    let config = DecoderConfig { tied_head, ..DecoderConfig::tiny(VOCAB) };
    let decoder = Decoder::random(config, Seed(seed), &Device::flex()).unwrap();
    Export::decoder("test", &decoder, &tokenizer, ExportType::F32).write(path, &Executor::default()).unwrap();
}

type Tensors = Vec<(TensorSpec, Vec<u8>)>;

fn tensors(checkpoint: &Checkpoint) -> Tensors {
    checkpoint.tensors().iter().map(|t| (t.spec(), checkpoint.bytes(&t.name).unwrap().to_vec())).collect()
}

/// Opens a copy of the GGUF file at `from` with other contents.
fn changed_gguf(
    from: &Path,
    change: impl FnOnce(&mut firebrick_tensor::checkpoint::gguf::Metadata, &mut Tensors),
) -> Result<ModelFiles, String> {
    let source = Checkpoint::open(from).unwrap();
    let (mut metadata, mut tensors) = (source.gguf().unwrap().metadata.clone(), tensors(&source));
    change(&mut metadata, &mut tensors);
    let path = from.with_file_name("changed.gguf");
    write_gguf(&path, &metadata, &tensors).unwrap();
    ModelFiles::open(&path).map_err(|e| e.to_string())
}

fn vector(name: &str, values: &[f32]) -> (TensorSpec, Vec<u8>) {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (TensorSpec::new(name, DType::F32, [values.len()]), bytes)
}

#[test]
fn tensors_without_a_place_in_gguf_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    write(&path, true, 1);
    changed_gguf(&path, |_, _| ()).unwrap();
    let error = changed_gguf(&path, |_, tensors| {
        tensors.push(vector("blk.0.attn_q_norm.weight", &[1.0; 4]));
        tensors.push(vector("blk.7.attn_q.bias", &[0.0; 16]));
    })
    .unwrap_err();
    assert!(error.contains("attn_q_norm.weight` has no place"), "{error}");
    assert!(error.contains("blk.7.attn_q.bias"), "every one is listed: {error}");
    let scalar = changed_gguf(&path, |_, tensors| {
        tensors[0] = (TensorSpec::new("token_embd.weight", DType::F32, []), vec![0; 4]);
    });
    assert!(scalar.unwrap_err().contains("not a matrix"));
    let error =
        changed_gguf(&path, |m, _| drop(m.insert("llama.rope.dimension_count".into(), Value::U32(2))));
    assert!(error.unwrap_err().contains("rotary dimensions"));
}

#[test]
fn tensors_without_a_place_in_a_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    write(&path, true, 1);
    let file = path.join("model.safetensors");
    let plain = tensors(&Checkpoint::open(&file).unwrap());
    let open = |extra: Tensors| {
        let all: Tensors = plain.iter().cloned().chain(extra).collect();
        write_safetensors(&file, &Default::default(), &all).unwrap();
        ModelFiles::open(&path).map_err(|e| e.to_string())
    };
    open(Vec::new()).unwrap();
    open(vec![vector("model.layers.0.self_attn.rotary_emb.inv_freq", &[1.0, 0.01])]).unwrap();
    let error = open(vec![vector("model.layers.1.self_attn.q_proj.bias", &[0.0; 16])]).unwrap_err();
    assert!(error.contains("q_proj.bias"), "{error}");

    let embedding = plain.iter().find(|(spec, _)| spec.name.contains("embed_tokens")).unwrap();
    let head = |bytes: Vec<u8>| {
        vec![(TensorSpec::new("lm_head.weight", DType::F32, embedding.0.shape.clone()), bytes)]
    };
    open(head(embedding.1.clone())).unwrap();
    let mut other = embedding.1.clone();
    other[0] ^= 1;
    let error = open(head(other)).unwrap_err();
    assert!(error.contains("lm_head.weight"), "a tied head that is another matrix: {error}");
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    write(&path, true, 1);
    train_bpe([TEXT], VOCAB + 1).unwrap().save(&path).unwrap();
    let error = ModelFiles::open(&path).unwrap_err().to_string();
    assert!(error.contains(&format!("the embedding has {VOCAB} rows")), "{error}");
}

#[test]
fn a_digest_sees_weights_and_configuration_alone() {
    let dir = tempfile::tempdir().unwrap();
    let digest = |name: &str, tied, seed| {
        let path = dir.path().join(name);
        write(&path, tied, seed);
        ModelFiles::open(&path).unwrap().digest().unwrap()
    };
    let one = digest("a", true, 1);
    assert_eq!(one.len(), 64);
    assert_eq!(digest("b", true, 1), one, "the place does not matter");
    assert_ne!(digest("c", true, 2), one);
    assert_ne!(digest("d", false, 1), one);
    let config = dir.path().join("a/config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["rms_norm_eps"] = 0.5.into();
    std::fs::write(&config, json.to_string()).unwrap();
    let changed = ModelFiles::open(&dir.path().join("a")).unwrap();
    assert_eq!(changed.config.norm_eps, 0.5);
    assert_ne!(changed.digest().unwrap(), one);
}
