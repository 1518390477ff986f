//! PyTorch's files (`tests/golden/make_pytorch.py`), whole and broken.

use firebrick_core::Seed;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, CheckpointError};
use firebrick_tensor::stream::{Convert, Executor, Target};
use rand::Rng;
use serde_json::json;
use std::path::Path;

const SAVED: &[u8] = include_bytes!("../../golden/pytorch.bin");
const VIEW: &[u8] = include_bytes!("../../golden/pytorch_view.bin");
const OLD: &[u8] = include_bytes!("../../golden/pytorch_old.bin");

// From memory: thousands of small files take seconds.
fn open(path: &Path, bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::from_static(bytes.to_vec().leak(), path)
}

#[test]
fn tensors_are_those_that_torch_saved() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("pytorch_model.bin"), SAVED).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let of = |name: &str| {
        let t = checkpoint.tensor(name).unwrap();
        (t.dtype, t.shape.clone(), checkpoint.read_f32(name).unwrap_or_default())
    };
    assert_eq!(checkpoint.tensors().len(), 8, "numbers and lists beside the tensors are left out");
    let weight = (DType::F32, vec![2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(of("encoder.weight"), weight);
    assert_eq!(of("encoder.tied"), weight, "two names, one storage");
    assert_eq!(of("encoder.part"), (DType::F32, vec![3], vec![3.0, 4.0, 5.0]));
    assert_eq!(of("encoder.LayerNorm.weight"), (DType::F16, vec![2], vec![1.0, -2.5]), "was gamma");
    assert_eq!(of("encoder.LayerNorm.bias"), (DType::BF16, vec![2], vec![0.5, 3.0]), "was beta");
    assert_eq!(of("scalar"), (DType::F64, vec![], vec![7.0]));
    assert_eq!(checkpoint.bytes("mask").unwrap(), [1, 0, 1]);
    let ids: Vec<u8> = [0i64, 1, 2].iter().flat_map(|i| i.to_le_bytes()).collect();
    assert_eq!(checkpoint.bytes("position_ids").unwrap(), ids);

    // The executor reads them as any other source.
    let out = folder.path().join("out");
    let copy = Convert::copy("torch", &checkpoint);
    Executor::default().run(&copy, &Target::folder(&out)).unwrap();
    let copy = Checkpoint::open(&out).unwrap();
    for t in checkpoint.tensors() {
        assert_eq!(copy.bytes(&t.name).unwrap(), checkpoint.bytes(&t.name).unwrap(), "{}", t.name);
    }
}

#[test]
fn shards_follow_their_index_and_stay_in_their_folder() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(outer.path().join("secret.bin"), SAVED).unwrap();
    let names =
        ["weight", "tied", "part", "LayerNorm.gamma", "LayerNorm.beta"].map(|n| format!("encoder.{n}"));
    let names = names.into_iter().chain(["position_ids", "mask", "scalar"].map(String::from));
    let all = |shard: &str| -> serde_json::Map<String, serde_json::Value> {
        names.clone().map(|name| (name, shard.into())).collect()
    };
    let index = |map: serde_json::Map<String, serde_json::Value>| {
        let text = json!({ "weight_map": map }).to_string();
        std::fs::write(folder.join("pytorch_model.bin.index.json"), text).unwrap();
        Checkpoint::open(&folder).map_err(|e| e.to_string())
    };
    let absolute = outer.path().join("secret.bin");
    let outside = [
        "../secret.bin",
        absolute.to_str().unwrap(),
        "sub/x.bin",
        "..\\secret.bin",
        "C:secret.bin",
        "..",
        "",
    ];
    for name in outside {
        let error = index(all(name)).unwrap_err();
        assert!(error.contains(&format!("shard `{name}` is not a plain file name")), "{error}");
    }
    std::fs::write(folder.join("a.bin"), SAVED).unwrap();
    assert_eq!(index(all("a.bin")).unwrap().tensors().len(), 8);
    let mut gone = all("a.bin");
    gone.insert("gone".into(), "a.bin".into());
    assert!(index(gone).unwrap_err().contains("`gone` is not in `a.bin`"));
    let mut more = all("a.bin");
    more.insert("x".into(), "b.bin".into());
    std::fs::write(folder.join("b.bin"), VIEW).unwrap();
    assert!(index(more).unwrap_err().contains("tensor `turned`: a view that is not contiguous"));
}

#[test]
fn what_is_refused_says_why_and_where() {
    let path = Path::new("m.bin");
    let refused = |bytes: &[u8], expected: &str| {
        let Err(error) = open(path, bytes) else { panic!("not refused with `{expected}`") };
        let error = error.to_string();
        assert!(error.contains(expected) && error.contains("m.bin"), "`{expected}` in `{error}`");
    };
    refused(VIEW, "tensor `turned`: a view that is not contiguous");
    refused(OLD, "at byte 0: not an archive of torch 1.6 or later");
    refused(b"", "at byte 0: not an archive");
    refused(b"PK\x03\x04", "the end of the archive is missing");
    refused(&SAVED[..SAVED.len() / 2], "the end of the archive is missing");
    let find = |needle: &[u8]| SAVED.windows(needle.len()).position(|w| w == needle).unwrap();
    let patched = |at: usize, patch: &[u8], expected: &str| {
        let mut bytes = SAVED.to_vec();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        refused(&bytes, expected);
    };
    // Torch writes the 64-bit end of an archive whatever its size.
    let end = find(b"PK\x06\x06");
    patched(end, b"PK\x06\x07", "no 64-bit end of a ZIP archive here");
    patched(end + 32, &[0xff; 2], "no directory entry of a ZIP archive here");
    patched(end + 48, &[0xff; 4], "directory lie behind the end");
    let entry = find(b"PK\x01\x02");
    patched(entry + 10, &[8, 0], "entry `pytorch/data.pkl` is compressed");
    patched(entry + 42, &[0xfe, 0xff, 0xff, 0xff], "entry `pytorch/data.pkl`: ");
    patched(entry + 46, &[0xff], "the name of an entry is not UTF-8");
    patched(entry + 46 + 8, b"data.pkx", "the archive holds no data.pkl");
    let program = find(b"\x80\x02");
    patched(program + 2, b"\xff", &format!("at byte {}: pickle: instruction 0xff", program + 2));
    patched(program + 2, b"N.", "the pickle is not a dictionary of tensors");
    patched(program + 2, b"R", "pickle: too few values");
    patched(program + 2, b"u", "pickle: no mark");
    patched(program + 2, b"h", "nothing was kept");
    patched(find(b"FloatStorage"), b"FloatStorxxx", "a tensor whose storage, offset, size or stride is none");
    patched(
        find(b"_rebuild_tensor_v2"),
        b"_rebuild_sparse_v2",
        "makes tensors of a kind that is not supported",
    );
    // The first tensor: size (2, 3) of one byte each, behind its offset.
    let size = find(b"K\x00K\x02K\x03\x86");
    patched(size + 3, &[200], "bytes from element 0 of f32 in a storage of 24 bytes");
    patched(size + 1, &[7], "bytes from element 7 of f32 in a storage of 24 bytes");
    patched(find(b"X\x01\x00\x00\x000q") + 5, b"9", "its storage `9` is missing");
}

#[test]
fn seeded_mutations_and_truncations_never_panic() {
    let path = Path::new("m.bin");
    for len in 0..SAVED.len() {
        assert!(open(path, &SAVED[..len]).is_err(), "{len} bytes");
    }
    let mut rng = Seed(7).stream("pytorch");
    let mut refused = 0;
    for _ in 0..2000 {
        let mut bytes = SAVED.to_vec();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len() - 8);
            match rng.random_range(0..5) {
                0 => bytes[at] = rng.random(),
                1 => bytes[at] ^= 1 << rng.random_range(0..8),
                2 => {
                    let extreme = [0, 1, 1 << 20, 1 << 40, u64::MAX / 8, u64::MAX][rng.random_range(0..6)];
                    bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(extreme));
                }
                3 => drop(bytes.remove(at)),
                _ => bytes.insert(at, rng.random()),
            }
        }
        match open(path, &bytes) {
            Err(_) => refused += 1,
            Ok(checkpoint) => {
                for tensor in checkpoint.tensors() {
                    assert_eq!(checkpoint.bytes(&tensor.name).unwrap().len(), tensor.len);
                }
            }
        }
    }
    assert!(refused > 500, "only {refused} of 2000 mutations were refused");
}

// A program that would build a thousand times its own length if values were copied.
#[test]
fn programs_can_not_multiply_their_length() {
    let mut program = b"\x80\x02}q\x00X\x04\x00\x00\x00name(".to_vec();
    program.extend(b"K\x01".repeat(50_000));
    program.extend(b"tq\x01");
    program.extend(b"h\x01h\x01\x86".repeat(50_000));
    program.extend(b"ctorch._utils\n_rebuild_tensor_v2\nq\x02");
    program.extend(b"h\x02h\x01R");
    program.push(b'.');
    let error = open(Path::new("m.bin"), &archived(&program)).unwrap_err().to_string();
    assert!(error.contains("a tensor whose storage, offset, size or stride is none"), "{error}");
    let fine = open(Path::new("m.bin"), &archived(b"\x80\x02}q\x00.")).unwrap_err().to_string();
    assert!(fine.contains("no tensors at its top level"), "control: the archive is whole: {fine}");
}

// A name that a thousand entries share is told once, and no storage has a name as long as that.
#[test]
fn shared_names_can_not_multiply_the_length_of_errors() {
    let text = |s: &str| [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat();
    let program = |name: &str, storage: &str| {
        let id = [text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text(storage), text("cpu")].concat();
        let tensor = [
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            &id[..],
            b"K\x01tQK\x00K\x01\x85K\x01\x85\x89}tRq\x02",
        ]
        .concat();
        let first = [b"\x80\x02}q\x00(", &text(name)[..], b"q\x01", &tensor].concat();
        [&first[..], &b"h\x01h\x02".repeat(1000), b"u."].concat()
    };
    let fails = |program: &[u8]| open(Path::new("m.bin"), &archived(program)).unwrap_err().to_string();
    let long = "n".repeat(10_000);
    let error = fails(&program(&long, "0"));
    assert!(error.contains("its storage `0` is missing") && error.contains("appears twice"), "{error}");
    assert!(error.len() < 3 * long.len(), "{}", error.len());
    let error = fails(&program("n", &long));
    assert!(error.contains("a tensor whose storage, offset, size or stride is none"), "{error}");
}

/// An archive with nothing but a program.
fn archived(program: &[u8]) -> Vec<u8> {
    let (name, size) = (b"m/data.pkl", (program.len() as u32).to_le_bytes());
    let names = (name.len() as u16).to_le_bytes();
    let local = [b"PK\x03\x04", &[0; 14][..], &size, &size, &names, &[0; 2], name, program].concat();
    let at = (local.len() as u32).to_le_bytes();
    let entry = [b"PK\x01\x02", &[0; 16][..], &size, &size, &names, &[0; 12], &[0; 4], name].concat();
    let length = (entry.len() as u32).to_le_bytes();
    let end = [b"PK\x05\x06", &[0; 4][..], &[1, 0, 1, 0], &length, &at, &[0; 2]].concat();
    [local, entry, end].concat()
}
