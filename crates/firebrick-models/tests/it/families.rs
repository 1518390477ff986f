//! Every family against transformers: `tests/golden/families`, made by `tests/golden/families.py`.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Part, Run, Seed, Site, SiteKind, Tap, Taps};
use firebrick_models::sampling::{Sampler, Sampling};
use firebrick_models::tokenizer::train_bpe;
use firebrick_models::{
    Activation, Decoder, DecoderConfig, Export, ExportType, Family, GenerateOptions, Model, ModelFiles,
    RopeScaling, generate, token_tensor,
};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, write_gguf};
use firebrick_tensor::stream::Executor;
use serde_json::Value;

const NAMES: [&str; 6] = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families")
}

fn facts() -> Value {
    serde_json::from_str(include_str!("../golden/families/golden.json")).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// A copy of a family's folder with a tokenizer in it.
fn folder(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(&path).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden().join(name).join(file), path.join(file)).unwrap();
    }
    train_bpe(["the quick brown fox and the lazy dog, the other fox and the other dog"], 264)
        .unwrap()
        .save(&path)
        .unwrap();
    path
}

fn open(path: &Path) -> Decoder {
    Model::open(path, &Device::flex()).unwrap().decoder
}

fn prompt() -> Tensor<2, Int> {
    token_tensor(&[&ids(&facts()["prompt"])], &Device::flex())
}

fn logits(decoder: &Decoder) -> Tensor<3> {
    decoder.forward(prompt(), &mut Run::default())
}

fn largest(a: Tensor<3>, b: Tensor<3>) -> f32 {
    (a - b).abs().max().into_scalar()
}

fn expected(name: &str) -> Tensor<3> {
    let checkpoint = Checkpoint::open(golden().join("golden.safetensors")).unwrap();
    let shape = checkpoint.get(name).unwrap().shape.clone();
    let values = checkpoint.read_f32(name).unwrap();
    Tensor::from_data(TensorData::new(values, [1, shape[0], shape[1]]), &Device::flex())
}

#[test]
fn logits_and_greedy_text_equal_transformers() {
    let (dir, facts) = (tempfile::tempdir().unwrap(), facts());
    assert_eq!(facts["families"].as_object().unwrap().len(), Family::all().len());
    for name in NAMES {
        let decoder = open(&folder(dir.path(), name));
        let worst = largest(logits(&decoder), expected(name));
        eprintln!("{name}: largest difference of logits {worst:.2e}");
        assert!(worst < 1e-4, "{name}: logits differ by {worst}");
        let greedy = ids(&facts["families"][name]["greedy"]);
        for use_cache in [true, false] {
            let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }).unwrap();
            let options =
                GenerateOptions { max_tokens: greedy.len(), use_cache, ..GenerateOptions::default() };
            let go = &mut |_| ControlFlow::Continue(());
            let found = generate(&decoder, &[], &ids(&facts["prompt"]), &mut sampler, &options, go).unwrap();
            assert_eq!(found, greedy, "{name}, cache: {use_cache}");
        }
    }
}

#[test]
fn cached_steps_equal_one_pass_beyond_the_window() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let decoder = open(&folder(dir.path(), name));
        let whole = logits(&decoder);
        let mut run = Run::default();
        run.insert(decoder.kv_cache(1, 12));
        let mut start = 0;
        for length in [5, 1, 1, 4, 1] {
            let part = decoder.forward(prompt().narrow(1, start, length), &mut run);
            let found = largest(part, whole.clone().narrow(1, start, length));
            assert!(found < 1e-4, "{name}: {found} at {start}");
            start += length;
        }
    }
}

type Change = fn(&mut DecoderConfig);

#[test]
fn every_setting_shows_in_the_logits() {
    let cases: [(&str, &str, Change); 14] = [
        ("llama", "rotary scaling", |c| c.rope_scaling = RopeScaling::None),
        ("mistral", "window", |c| c.window = None),
        ("mistral", "width of the window", |c| c.window = Some(5)),
        ("qwen2", "window", |c| (c.window, c.windowed) = (None, Vec::new())),
        ("qwen2", "which layer", |c| c.windowed = vec![true, true]),
        ("gemma2", "window", |c| c.windowed = vec![false, false]),
        ("gemma2", "cap of scores", |c| c.attn_softcap = None),
        ("gemma2", "cap of logits", |c| c.final_softcap = None),
        ("gemma2", "scale of scores", |c| c.query_scale = None),
        ("gemma3", "window", |c| c.windowed = vec![false, false, false]),
        ("gemma3", "scale of scores", |c| c.query_scale = None),
        ("gemma3", "cap of logits", |c| c.final_softcap = None),
        ("gemma3", "rotary scaling", |c| c.rope_scaling = RopeScaling::None),
        ("gemma3", "local base", |c| c.local_theta = Some(1000.0)),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (name, what, change) in cases {
        let files = ModelFiles::open(&folder(dir.path(), name)).unwrap();
        let mut config = files.config.clone();
        change(&mut config);
        let changed = Decoder::load(config, &files.weights(), &Device::flex()).unwrap();
        let found = largest(logits(&changed), expected(name));
        assert!(found > 1e-2, "control: {name} without its {what} differs by {found}");
    }
}

#[test]
fn every_vector_shows_in_the_logits() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = BTreeSet::new();
    for name in NAMES {
        let decoder = open(&folder(dir.path(), name));
        let vectors: Vec<Site> = decoder
            .sites()
            .entries()
            .iter()
            .filter(|e| matches!(e.kind, SiteKind::Bias { .. } | SiteKind::Norm { .. }))
            .map(|e| e.site)
            .filter(|s| s.layer == Some(1))
            .collect();
        for site in vectors {
            let weight = decoder.weight(site).unwrap();
            let changed = decoder.clone().with_weight(site, weight.clone() + 0.5);
            assert_eq!(changed.weight(site).unwrap().into_data(), (weight + 0.5).into_data());
            let found = largest(logits(&changed), expected(name));
            // A bias of all keys alike moves every score of a query by the same amount, but for the rotation.
            assert!(found > 1e-3, "control: {name} with another {site} differs by {found}");
            seen.insert(site.part);
        }
    }
    assert_eq!(seen.len(), 7 + 4 + 2, "all biases and norms: {seen:?}");
}

#[test]
fn every_site_of_every_family_carries_bricks() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let decoder = open(&folder(dir.path(), name));
        let tap = Tap { sites: decoder.sites().all() };
        let bricks: [&dyn Brick; 1] = [&tap];
        let mut run = Run::new(&bricks);
        let found = decoder.forward(prompt(), &mut run);
        let passed: Vec<Site> = run.take::<Taps>().unwrap().seen.iter().map(|(site, ..)| *site).collect();
        assert_eq!(passed.len(), decoder.sites().all().len(), "{name}: each site once");
        assert_eq!(passed.into_iter().collect::<BTreeSet<_>>(), decoder.sites().all().iter().collect());
        assert_eq!(largest(found, logits(&decoder)), 0.0);
    }
}

#[test]
fn nll_is_the_cross_entropy_of_capped_logits() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["gemma2", "llama"] {
        let decoder = open(&folder(dir.path(), name));
        let nll: Vec<f64> =
            decoder.nll(prompt(), &mut Run::default()).into_data().try_into_vec_as::<f64>().unwrap();
        let z: Vec<f64> = expected(name).into_data().try_into_vec_as::<f64>().unwrap();
        let ids = ids(&facts()["prompt"]);
        let vocab = z.len() / ids.len();
        for (i, found) in nll.iter().enumerate() {
            let row = &z[i * vocab..][..vocab];
            let expected = row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[ids[i + 1] as usize];
            assert!((found - expected).abs() < 1e-4, "{name}: {found} against {expected}");
        }
    }
}

/// Every tensor of a checkpoint as f32, by name.
fn tensors(path: &Path) -> Vec<(String, Vec<f32>)> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut all: Vec<_> = checkpoint
        .tensors()
        .iter()
        .map(|t| (t.name.clone(), checkpoint.read_f32(&t.name).unwrap()))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

#[test]
fn folders_and_gguf_hold_every_family() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: String| dir.path().join(name);
    let executor = Executor::default();
    for name in NAMES {
        let source = folder(dir.path(), name);
        let files = ModelFiles::open(&source).unwrap();
        let original = open(&source);
        let (again, gguf, back) =
            (at(format!("{name}-again")), at(format!("{name}.gguf")), at(format!("{name}-back")));
        Export::files(&files, ExportType::BF16).write(&again, &executor).unwrap();
        assert_eq!(tensors(&again.join("model.safetensors")), tensors(&source.join("model.safetensors")));
        let config = ModelFiles::open(&again).unwrap().config;
        assert_eq!(DecoderConfig { extra: files.config.extra.clone(), ..config }, files.config);

        Export::files(&files, ExportType::F32).write(&gguf, &executor).unwrap();
        let read = ModelFiles::open(&gguf).unwrap();
        assert_eq!(DecoderConfig { extra: files.config.extra.clone(), ..read.config.clone() }, files.config);
        // GGUF holds norms with 1 added, which rounds.
        let rounds = files.config.norm_plus_one;
        let found = largest(logits(&open(&gguf)), logits(&original));
        eprintln!("{name}: logits from GGUF differ by {found:.1e}");
        assert!(if rounds { found < 1e-4 } else { found == 0.0 }, "{name}: {found}");

        Export::files(&read, ExportType::F32).write(&back, &executor).unwrap();
        let pairs = tensors(&back.join("model.safetensors"));
        let pairs = pairs.iter().zip(tensors(&source.join("model.safetensors")));
        for ((a, values), (b, expected)) in pairs.map(|(a, b)| ((&a.0, &a.1), (b.0, b.1))) {
            assert_eq!(a, &b);
            let worst = values.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(if rounds { worst < 1e-6 } else { worst == 0.0 }, "{name}, {a}: {worst}");
        }

        // From a decoder the same file as from files, but for the name.
        let other = at(format!("{name}-decoder.gguf"));
        Export::decoder(name, &original, &files.tokenizer, ExportType::F32).write(&other, &executor).unwrap();
        assert_eq!(tensors(&other), tensors(&gguf), "{name}");
        let packed = at(format!("{name}-q8.gguf"));
        Export::files(&files, ExportType::Q8_0).write(&packed, &executor).unwrap();
        let rounded = largest(logits(&open(&packed)), logits(&original));
        let size: f32 = logits(&original).square().mean().sqrt().into_scalar();
        eprintln!("{name}: 8 bits change logits by {:.2} of their size", rounded / size);
        assert!(rounded > 0.0 && rounded < 0.25 * size, "{name}: 8 bits change logits by {rounded}");
    }
}

#[test]
fn gguf_stores_norms_of_gemma_with_one_added_and_q_of_llama_in_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let both = |name: &str, hf: &str, gguf: &str| {
        let source = folder(dir.path(), name);
        let path = dir.path().join(format!("{name}.gguf"));
        let files = ModelFiles::open(&source).unwrap();
        let executor = Executor { overwrite: true, ..Executor::default() };
        Export::files(&files, ExportType::F32).write(&path, &executor).unwrap();
        (files.checkpoint.read_f32(hf).unwrap(), Checkpoint::open(&path).unwrap().read_f32(gguf).unwrap())
    };
    for name in ["gemma2", "gemma3"] {
        for (hf, gguf) in [
            ("model.layers.1.pre_feedforward_layernorm.weight", "blk.1.ffn_norm.weight"),
            ("model.layers.1.post_feedforward_layernorm.weight", "blk.1.post_ffw_norm.weight"),
            ("model.norm.weight", "output_norm.weight"),
        ] {
            let (hf, gguf) = both(name, hf, gguf);
            assert_eq!(gguf, hf.iter().map(|v| v + 1.0).collect::<Vec<_>>());
        }
    }
    let (hf, gguf) = both("gemma3", "model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight");
    assert_eq!(gguf, hf.iter().map(|v| v + 1.0).collect::<Vec<_>>());
    let (hf, gguf) = both("qwen3", "model.norm.weight", "output_norm.weight");
    assert_eq!(gguf, hf, "control");
    // The rows of a head of 8: 0, 4, 1, 5, ...
    let (hf, gguf) = both("llama", "model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias");
    assert_eq!(gguf[..4], [hf[0], hf[4], hf[1], hf[5]]);
    let (hf, gguf) = both("qwen2", "model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias");
    assert_eq!(gguf, hf, "control: only `llama` is permuted");
}

#[test]
fn rotary_divisors_of_another_kind_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let files = ModelFiles::open(&folder(dir.path(), "llama")).unwrap();
    Export::files(&files, ExportType::F32).write(&path, &Executor::default()).unwrap();
    let source = Checkpoint::open(&path).unwrap();
    let metadata = source.gguf().unwrap().metadata.clone();
    let mut all: Vec<_> =
        source.tensors().iter().map(|t| (t.spec(), source.bytes(&t.name).unwrap().to_vec())).collect();
    let divisors = all.iter_mut().find(|(spec, _)| spec.name == "rope_freqs.weight").unwrap();
    assert_eq!((divisors.0.dtype, &divisors.0.shape[..]), (DType::F32, &[4][..]));
    let original = divisors.1.clone();
    let mut change = |bytes: Vec<u8>| {
        let divisors = all.iter_mut().find(|(spec, _)| spec.name == "rope_freqs.weight").unwrap();
        divisors.1 = bytes;
        let changed = dir.path().join("changed.gguf");
        write_gguf(&changed, &metadata, &all).unwrap();
        ModelFiles::open(&changed).map_err(|e| e.to_string())
    };
    assert_eq!(change(original.clone()).unwrap().config.rope_scaling, files.config.rope_scaling, "control");
    let values = |v: [f32; 4]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    for bad in [values([1.0, 2.0, 4.0, 8.0]), values([f32::NAN; 4]), values([0.0; 4])] {
        assert!(change(bad).unwrap_err().contains("rope_freqs"));
    }
}

#[test]
fn layers_can_be_left_out_of_a_pattern() {
    let dir = tempfile::tempdir().unwrap();
    let source = folder(dir.path(), "gemma3");
    let files = ModelFiles::open(&source).unwrap();
    let cut = open(&source).with_layers(&[2, 0]);
    for name in ["cut", "cut.gguf"] {
        let path = dir.path().join(name);
        Export::files(&files, ExportType::F32)
            .with_layers(vec![2, 0])
            .write(&path, &Executor::default())
            .unwrap();
        let back = open(&path);
        assert_eq!(back.config().windowed, [false, true]);
        let found = largest(logits(&back), logits(&cut));
        assert!(found < 1e-4, "{name}: {found}");
    }
    assert!(
        largest(logits(&cut), logits(&open(&source).with_layers(&[0, 2]))) > 1e-2,
        "control: the order counts"
    );
}

/// The feed-forward network of Gemma and the norms on heads, against f64.
#[test]
fn a_block_by_hand_in_f64() {
    let dir = tempfile::tempdir().unwrap();
    let decoder = open(&folder(dir.path(), "gemma3"));
    let config = decoder.config();
    assert_eq!(config.activation, Activation::GeluTanh);
    let (d, f, n) = (config.d_model, config.d_ff, 5);
    let x = Seed(3).normal("x", n * d, 1.0);
    let host = |part| -> Vec<f64> {
        decoder.weight(Site::layer(0, part)).unwrap().into_data().try_into_vec_as::<f64>().unwrap()
    };
    let (gate, up, down) = (host(Part::MlpGate), host(Part::MlpUp), host(Part::MlpDown));
    let dot = |w: &[f64], row: usize, v: &[f64]| {
        w[row * v.len()..][..v.len()].iter().zip(v).map(|(a, b)| a * b).sum()
    };
    let tap = Tap { sites: [Site::layer(0, Part::Mlp)].into_iter().collect() };
    let bricks: [&dyn Brick; 1] = [&tap];
    let mut run = Run::new(&bricks);
    decoder.block(0, Tensor::from_data(TensorData::new(x, [1, n, d]), &Device::flex()), &mut run);
    let (_, input, output) = run.take::<Taps>().unwrap().seen.remove(0);
    let input: Vec<f64> = input.into_data().try_into_vec_as::<f64>().unwrap();
    let output: Vec<f64> = output.into_data().try_into_vec_as::<f64>().unwrap();
    let gelu = |v: f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3));
        v / 2.0 * (1.0 + inner.tanh())
    };
    let silu = |v: f64| v / (1.0 + (-v).exp());
    let worst = |act: &dyn Fn(f64) -> f64| {
        let mut worst = 0.0f64;
        for t in 0..n {
            let x = &input[t * d..][..d];
            let inner: Vec<f64> = (0..f)
                .map(|i| {
                    let (g, u): (f64, f64) = (dot(&gate, i, x), dot(&up, i, x));
                    act(g) * u
                })
                .collect();
            for o in 0..d {
                let y: f64 = dot(&down, o, &inner);
                worst = worst.max((y - output[t * d + o]).abs());
            }
        }
        worst
    };
    assert!(worst(&gelu) < 1e-4, "{}", worst(&gelu));
    assert!(worst(&silu) > 1e-1, "control: another activation");
}
