//! Folders of shards.

use super::strings;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, CheckpointError, TensorSpec, write_safetensors};
use serde_json::json;
use std::path::Path;

const MODEL_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

fn shard(folder: &Path, file: &str, tensors: &[(&str, f32)]) {
    let tensor = |(name, value): &(&str, f32)| (TensorSpec::new(*name, DType::F32, [1]), value.to_le_bytes());
    let tensors: Vec<_> = tensors.iter().map(tensor).collect();
    write_safetensors(folder.join(file), &strings(&[("from", file)]), &tensors).unwrap();
}

fn index(folder: &Path, weight_map: serde_json::Value) {
    let index = json!({"metadata": {"total_size": 12}, "weight_map": weight_map});
    std::fs::write(folder.join(INDEX_FILE), index.to_string()).unwrap();
}

fn problems(folder: &Path) -> Vec<String> {
    match Checkpoint::open(folder).unwrap_err() {
        CheckpointError::Problems { path, problems } => {
            assert_eq!(path, folder.join(INDEX_FILE));
            problems
        }
        other => panic!("{other}"),
    }
}

#[test]
fn shards_read_as_one_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    shard(folder, "m-2.safetensors", &[("c", 3.0)]);
    shard(folder, "m-1.safetensors", &[("b", 2.0), ("a", 1.0)]);
    index(folder, json!({"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}));
    let checkpoint = Checkpoint::open(folder).unwrap();
    assert_eq!(checkpoint.path(), folder);
    assert_eq!(checkpoint.files(), [folder.join("m-1.safetensors"), folder.join("m-2.safetensors")]);
    let read: Vec<_> = checkpoint
        .tensors()
        .iter()
        .map(|t| (t.name.as_str(), t.file, checkpoint.read_f32(&t.name).unwrap()[0]))
        .collect();
    assert_eq!(read, [("b", 0, 2.0), ("a", 0, 1.0), ("c", 1, 3.0)]);
    assert_eq!(checkpoint.metadata()["from"], "m-1.safetensors");

    // An unsharded file wins over an index, as in Hugging Face's loader.
    shard(folder, MODEL_FILE, &[("whole", 4.0)]);
    let checkpoint = Checkpoint::open(folder).unwrap();
    assert_eq!(checkpoint.path(), folder);
    assert_eq!(checkpoint.read_f32("whole").unwrap(), [4.0]);
}

#[test]
fn everything_missing_is_listed_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    shard(folder, "1.safetensors", &[("a", 1.0), ("moved", 1.0), ("extra", 1.0)]);
    shard(folder, "2.safetensors", &[("b", 1.0)]);
    index(
        folder,
        json!({"a": "1.safetensors", "gone": "1.safetensors", "b": "2.safetensors", "moved": "2.safetensors",
               "x": "3.safetensors", "y": "3.safetensors", "z": "4.safetensors"}),
    );
    let problems = problems(folder).join("\n");
    for expected in
        ["3.safetensors", "4.safetensors", "`gone` is not in", "`moved` is in `1", "`extra` of `1"]
    {
        assert!(problems.contains(expected), "{expected} in:\n{problems}");
    }
    assert_eq!(problems.lines().count(), 5, "{problems}");
}

#[test]
fn an_index_can_not_reach_outside_its_folder() {
    let outer = tempfile::tempdir().unwrap();
    shard(outer.path(), "secret.safetensors", &[("a", 1.0)]);
    let absolute = outer.path().join("secret.safetensors");
    let folder = outer.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    for name in [
        "../secret.safetensors",
        absolute.to_str().unwrap(),
        "sub/../../secret.safetensors",
        "sub/x.safetensors",
        "./secret.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "secret.safetensors\0",
        "..",
        ".",
        "",
    ] {
        index(&folder, json!({"a": name}));
        assert_eq!(problems(&folder), [format!("shard `{name}` is not a plain file name")]);
    }
    // The same file inside the folder is fine, so it was the name that was refused.
    std::fs::copy(&absolute, folder.join("secret.safetensors")).unwrap();
    index(&folder, json!({"a": "secret.safetensors"}));
    assert!(Checkpoint::open(&folder).is_ok());
}

#[test]
fn what_is_not_a_checkpoint_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let empty = Checkpoint::open(folder.path()).unwrap_err();
    assert!(matches!(empty, CheckpointError::NotACheckpoint { .. }), "{empty}");
    let missing = Checkpoint::open(folder.path().join("none")).unwrap_err();
    assert!(matches!(missing, CheckpointError::Io { .. }), "{missing}");
    for text in ["", "[]", "{\"weight_map\": 3}", "{\"weight_map\": {}}"] {
        std::fs::write(folder.path().join(INDEX_FILE), text).unwrap();
        let broken = Checkpoint::open(folder.path()).unwrap_err();
        assert!(matches!(broken, CheckpointError::Malformed { .. }), "{broken}");
    }
    if Path::new("/dev/null").exists() {
        let device = Checkpoint::open("/dev/null").unwrap_err();
        assert!(matches!(device, CheckpointError::NotACheckpoint { .. }), "{device}");
    }
}
