//! Models and checkpoints set against each other.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use firebrick_core::{Part, Seed, Silent, Site};
use firebrick_models::tokenizer::{Tokenizer, train_bpe};
use firebrick_models::{
    Decoder, DecoderConfig, Diff, Export, ExportType, ModelFiles, diff, diff_checkpoints,
};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, write_safetensors};
use firebrick_tensor::stream::Executor;

fn tokenizer() -> Tokenizer {
    train_bpe(["the quick brown fox jumps over the lazy dog and the quick brown fox runs on"], 272).unwrap()
}

fn decoder(tokenizer: &Tokenizer) -> Decoder {
    let config =
        DecoderConfig { d_model: 32, d_ff: 64, head_dim: 8, ..DecoderConfig::tiny(tokenizer.vocab_size()) };
    Decoder::random(config, Seed(9), &Device::flex()).unwrap()
}

fn write(dir: &Path, name: &str, decoder: &Decoder, tokenizer: &Tokenizer, dtype: ExportType) -> PathBuf {
    let path = dir.join(name);
    Export::decoder("test", decoder, tokenizer, dtype).write(&path, &Executor::default()).unwrap();
    path
}

fn between(a: &Path, b: &Path) -> Diff {
    diff(&ModelFiles::open(a).unwrap(), &ModelFiles::open(b).unwrap(), &Silent).unwrap()
}

#[test]
fn a_model_is_itself_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let decoder = decoder(&tokenizer);
    let folder = write(dir.path(), "folder", &decoder, &tokenizer, ExportType::F32);
    let gguf = write(dir.path(), "m.gguf", &decoder, &tokenizer, ExportType::F32);
    for (a, b) in [(&folder, &folder), (&folder, &gguf), (&gguf, &folder)] {
        let found = between(a, b);
        assert!(found.only_a.is_empty() && found.only_b.is_empty());
        assert!(found.tensors.iter().all(|t| t.identical), "{found:?}");
        let total = found.total;
        assert_eq!((total.max_abs, total.relative, total.not_finite), (0.0, Some(0.0), 0));
        assert!((total.cosine.unwrap() - 1.0).abs() < 1e-12);
        let elements: usize = found.tensors.iter().map(|t| t.a.shape.iter().product::<usize>()).sum();
        assert_eq!(total.elements, elements);
        // embed, norm, and of the block two norms and seven matrices.
        assert_eq!((found.parts.len(), found.layers.len()), (11, 2));
    }
    // By name the formats have nothing in common; and their rows of q do differ.
    let by_name =
        diff_checkpoints(&Checkpoint::open(&folder).unwrap(), &Checkpoint::open(&gguf).unwrap(), &Silent);
    let by_name = by_name.unwrap();
    assert!(
        by_name.tensors.is_empty() && !by_name.only_a.is_empty() && !by_name.only_b.is_empty(),
        "control"
    );
    let (a, b) = (Checkpoint::open(&folder).unwrap(), Checkpoint::open(&gguf).unwrap());
    let q = a.distance("model.layers.0.self_attn.q_proj.weight", &b, "blk.0.attn_q.weight", None).unwrap();
    assert!(q.max_abs > 0.0, "control: the order of the rows matters");
}

#[test]
fn distances_are_those_of_plain_loops() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let base = decoder(&tokenizer);
    let site = Site::layer(1, Part::AttnK);
    let read = |d: &Decoder| d.weight(site).unwrap().into_data().try_into_vec_as::<f32>().unwrap();
    let weight = base.weight(site).unwrap();
    let noise = Seed(4).normal("noise", read(&base).len(), 0.01);
    let noise = burn::tensor::TensorData::new(noise, weight.dims());
    let changed =
        base.clone().with_weight(site, weight + burn::tensor::Tensor::from_data(noise, &Device::flex()));
    let a = write(dir.path(), "a", &base, &tokenizer, ExportType::F32);
    let b = write(dir.path(), "b.gguf", &changed, &tokenizer, ExportType::F32);
    let found = between(&a, &b);
    let one = found.tensors.iter().find(|t| t.site == Some(site)).unwrap();
    let values = one.values.unwrap();
    let (x, y) = (read(&base), read(&changed));
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        x.iter().zip(&y).map(|(x, y)| f(f64::from(*x), f64::from(*y))).sum()
    };
    let (aa, bb, ab) = (sum(&|a, _| a * a), sum(&|_, b| b * b), sum(&|a, b| a * b));
    let relative = (sum(&|a, b| (a - b).powi(2)) / aa).sqrt();
    assert!((values.relative.unwrap() / relative - 1.0).abs() < 1e-12);
    assert!((values.cosine.unwrap() - ab / (aa * bb).sqrt()).abs() < 1e-12);
    let largest = x.iter().zip(&y).map(|(x, y)| (f64::from(*x) - f64::from(*y)).abs()).fold(0.0, f64::max);
    assert_eq!(values.max_abs, largest);
    assert!(!one.identical && found.tensors.iter().filter(|t| !t.identical).count() == 1);
    let of = |name: &str| {
        let sums = found.parts.iter().chain(&found.layers);
        sums.clone().find(|s| s.of == name).unwrap().values.relative.unwrap()
    };
    assert!(of("attn.k") > 0.0 && of("attn.k") < relative, "the other layer's k counts too");
    assert_eq!((of("attn.q"), of("layers.0")), (0.0, 0.0));
    assert!(of("layers.1") > 0.0 && found.total.relative.unwrap() < of("layers.1"));
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| between(&a, &b)), found, "{threads} threads");
    }
}

#[test]
fn what_is_missing_or_stored_otherwise_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    let base = decoder(&tokenizer);
    let a = write(dir.path(), "a", &base, &tokenizer, ExportType::F32);
    let half = write(dir.path(), "half", &base, &tokenizer, ExportType::BF16);
    let found = between(&a, &half);
    assert!(found.tensors.iter().all(|t| (t.a.dtype, t.b.dtype) == (DType::F32, DType::BF16)));
    let relative = found.total.relative.unwrap();
    assert!(relative > 1e-4 && relative < 4e-3, "{relative}");
    let short = write(dir.path(), "short", &base.with_layers(&[1]), &tokenizer, ExportType::F32);
    let found = between(&a, &short);
    assert_eq!((found.only_a.len(), found.only_b.len()), (9, 0));
    assert!(found.only_a.iter().all(|n| n.contains("layers.1")));
    assert_eq!(between(&short, &a).only_b, found.only_a);

    let file = |name: &str, tensors: &[(&str, DType, &[usize], Vec<u8>)]| {
        let path = dir.path().join(name);
        let tensors: Vec<_> =
            tensors.iter().map(|(n, d, s, b)| (TensorSpec::new(*n, *d, s.to_vec()), b.clone())).collect();
        write_safetensors(&path, &Default::default(), &tensors).unwrap();
        Checkpoint::open(path).unwrap()
    };
    let floats = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let x = file(
        "x.safetensors",
        &[
            ("shape", DType::F32, &[2, 1], floats(&[1.0, 2.0])),
            ("ids", DType::I32, &[1], vec![1; 4]),
            ("nan", DType::F32, &[3], floats(&[1.0, f32::NAN, 3.0])),
            ("zero", DType::F32, &[1], floats(&[0.0])),
        ],
    );
    let y = file(
        "y.safetensors",
        &[
            ("shape", DType::F32, &[1, 2], floats(&[1.0, 2.0])),
            ("ids", DType::I32, &[1], vec![2; 4]),
            ("nan", DType::F32, &[3], floats(&[1.5, 2.0, f32::INFINITY])),
            ("zero", DType::F32, &[1], floats(&[1.0])),
        ],
    );
    let found = diff_checkpoints(&x, &y, &Silent).unwrap();
    let of = |name: &str| found.tensors.iter().find(|t| t.a.name == name).unwrap();
    assert!(of("shape").values.is_none() && of("ids").values.is_none() && !of("ids").identical);
    let nan = of("nan").values.unwrap();
    assert_eq!((nan.not_finite, nan.max_abs, nan.elements), (2, 0.5, 3));
    let zero = of("zero").values.unwrap();
    assert_eq!((zero.relative, zero.cosine), (None, None));
    assert!(found.parts.is_empty() && found.layers.is_empty());
    assert_eq!((x.count_not_finite("nan").unwrap(), x.count_not_finite("zero").unwrap()), (1, 0));
    assert!(x.count_not_finite("ids").is_err());
}
