//! Files exchanged with the Python packages `gguf` and `safetensors`, where a Python that has them is given.

use super::gguf::rewrite;
use super::strings;
use firebrick_tensor::block::{DType, encode};
use firebrick_tensor::checkpoint::gguf::{Array, Metadata, Strings};
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, Value, write_gguf, write_safetensors};
use serde_json::json;
use std::process::Command;

fn encoded(name: &str, dtype: DType, values: &[f32], shape: &[usize]) -> (TensorSpec, Vec<u8>) {
    let mut bytes = vec![0; dtype.bytes_for(values.len()).unwrap()];
    encode(dtype, values, &mut bytes).unwrap();
    (TensorSpec::new(name, dtype, shape), bytes)
}

#[test]
#[allow(clippy::print_stderr)]
fn python_reads_our_files_and_we_read_its() {
    let Some(python) = std::env::var_os("FIREBRICK_PYTHON") else {
        eprintln!("skipped: FIREBRICK_PYTHON is not set to a python with gguf, safetensors and torch");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);

    let values: Vec<f32> = (0..768).map(|i| (i as f32 * 0.37).sin()).collect();
    let metadata = Metadata::from([
        ("general.architecture".to_owned(), "llama".into()),
        ("llama.block_count".to_owned(), 2u32.into()),
        ("tokenizer.ggml.tokens".to_owned(), Array::String(Strings::from_iter(["a", "", "é"])).into()),
        ("tokenizer.ggml.scores".to_owned(), Array::F32(vec![0.5, -1.0]).into()),
        ("x.i64".to_owned(), Value::I64(-5)),
        ("x.flag".to_owned(), true.into()),
    ]);
    let reals: Vec<DType> = DType::all().filter(|d| d.is_real() && *d != DType::F64).collect();
    let tensors: Vec<_> = reals.iter().map(|&d| encoded(d.name(), d, &values, &[3, 256])).collect();
    write_gguf(path("ours.gguf"), &metadata, &tensors).unwrap();
    let plain = [
        encoded("half", DType::BF16, &[1.0, -2.5, 3.0], &[3]),
        encoded("wide", DType::F64, &[0.5; 4], &[2, 2]),
        (TensorSpec::new("flag", DType::Bool, []), vec![1]),
        (TensorSpec::new("ids", DType::I64, [1]), (-3i64).to_le_bytes().to_vec()),
    ];
    write_safetensors(path("ours.safetensors"), &strings(&[("note", "é")]), &plain).unwrap();

    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/checkpoint/check.py");
    let files = ["ours.gguf", "theirs.gguf", "ours.safetensors", "theirs.safetensors"].map(path);
    let output = Command::new(python).arg(script).args(files).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let seen: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();

    let fields = json!({"general.architecture": "llama", "llama.block_count": 2, "tokenizer.ggml.tokens": ["a", "", "é"],
        "tokenizer.ggml.scores": [0.5, -1.0], "x.i64": -5, "x.flag": true});
    assert_eq!(seen["fields"], fields);
    let ours = Checkpoint::open(path("ours.gguf")).unwrap();
    for dtype in reals {
        let expected = json!([dtype.name().to_uppercase(), [3, 256], ours.read_f32(dtype.name()).unwrap()]);
        assert_eq!(seen["gguf"][dtype.name()], expected, "{dtype}");
    }
    assert_eq!(seen["metadata"], json!({"format": "pt", "note": "é"}));
    let torches = json!({"half": ["torch.bfloat16", [3], [1.0, -2.5, 3.0]], "flag": ["torch.bool", [], [1.0]],
        "wide": ["torch.float64", [2, 2], [0.5, 0.5, 0.5, 0.5]], "ids": ["torch.int64", [1], [-3.0]]});
    assert_eq!(seen["safetensors"], torches);

    let theirs = Checkpoint::open(path("theirs.gguf")).unwrap();
    let gguf = theirs.gguf().unwrap();
    assert_eq!(gguf.u32("llama.block_count").unwrap(), 30);
    assert_eq!(gguf.f32("llama.rope.freq_base").unwrap(), 1e5);
    assert_eq!(
        gguf.strings("tokenizer.ggml.tokens").unwrap().iter().collect::<Vec<_>>(),
        ["<s>", "Ġthe", ""]
    );
    assert_eq!(gguf.i32s("tokenizer.ggml.token_type").unwrap(), [3, 1, 1]);
    let values: Vec<f32> = (0..192).map(|i| (i as f32 - 96.0) / 7.0).collect();
    for (name, dtype) in
        [("a", DType::Q4_0), ("b", DType::Q4_1), ("c", DType::Q8_0), ("d", DType::BF16), ("e", DType::F32)]
    {
        let name = format!("{name}.weight");
        let (spec, bytes) = encoded(&name, dtype, &values, &[3, 64]);
        assert_eq!(theirs.tensor(&name).unwrap().spec(), spec);
        assert_eq!(theirs.bytes(&name).unwrap(), bytes, "{dtype}");
    }
    rewrite(&theirs, &path("again.gguf"));
    assert_eq!(std::fs::read(path("again.gguf")).unwrap(), std::fs::read(path("theirs.gguf")).unwrap());

    let theirs = Checkpoint::open(path("theirs.safetensors")).unwrap();
    assert_eq!(theirs.read_f32("w").unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(theirs.tensor("w").unwrap().shape, [2, 3]);
    assert_eq!(theirs.read_f32("scalar").unwrap(), [2.5]);
    assert!(theirs.tensor("scalar").unwrap().shape.is_empty());
    assert_eq!(theirs.bytes("mask").unwrap(), [1, 0, 1]);
    assert_eq!(theirs.tensor("ids").unwrap().dtype, DType::I64);
}
