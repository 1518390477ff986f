//! Files made to break readers: no panic, no hang, and an error that says where.

use super::gguf::by_hand;
use super::strings;
use firebrick_core::Seed;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, CheckpointError, TensorSpec, write_safetensors};
use rand::Rng;
use std::path::Path;
use std::time::{Duration, Instant};

fn safetensors() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let tensors = [
        (TensorSpec::new("model.layers.0.w", DType::F32, [2, 3]), vec![1; 24]),
        (TensorSpec::new("model.layers.0.b", DType::BF16, [3]), vec![2; 6]),
        (TensorSpec::new("ids", DType::I64, [1]), vec![3; 8]),
    ];
    write_safetensors(&path, &strings(&[("note", "x")]), &tensors).unwrap();
    std::fs::read(path).unwrap()
}

// Opens the bytes and reads everything that opens; from memory, because thousands of small files take seconds.
fn open(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let start = Instant::now();
    let result = Checkpoint::from_static(bytes.to_vec().leak(), path).map(|checkpoint| {
        for tensor in checkpoint.tensors() {
            assert_eq!(checkpoint.bytes(&tensor.name).unwrap().len(), tensor.len);
            assert_eq!(checkpoint.read_f32(&tensor.name).is_ok(), tensor.dtype.is_real());
        }
    });
    assert!(start.elapsed() < Duration::from_secs(2));
    if let Err(error) = &result {
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    result
}

#[test]
fn seeded_mutations_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mutated");
    for (name, valid) in [("gguf", by_hand(3)), ("safetensors", safetensors())] {
        assert!(open(&path, &valid).is_ok());
        let mut rng = Seed(3).stream(name);
        let mut refused = 0;
        for _ in 0..400 {
            let mut bytes = valid.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len().max(9) - 8);
                match rng.random_range(0..5) {
                    0 => bytes[at] = rng.random(),
                    1 => bytes[at] ^= 1 << rng.random_range(0..8),
                    2 => {
                        let extreme =
                            [0, 1, 1 << 20, 1 << 40, u64::MAX / 8, u64::MAX][rng.random_range(0..6)];
                        bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(extreme));
                    }
                    3 => {
                        bytes.remove(at);
                    }
                    _ => bytes.insert(at, rng.random()),
                }
            }
            refused += usize::from(open(&path, &bytes).is_err());
        }
        assert!(refused > 150, "{name}: only {refused} of 400 mutations were refused");
    }
}

#[test]
fn an_empty_or_broken_file_on_disk_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("empty.safetensors", &b""[..]), ("empty.gguf", b""), ("short.gguf", b"GGUF\x03\0")]
    {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(&path).unwrap_err();
        assert!(matches!(error, CheckpointError::Malformed { .. }), "{error}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("short.gguf");
    let valid = by_hand(3);
    // The last tensor ends 56 bytes of padding before the end of the file.
    for len in 0..valid.len() - 56 {
        assert!(open(&path, &valid[..len]).is_err(), "{len} bytes");
    }
    assert!(open(&path, &valid[..valid.len() - 56]).is_ok());
    let path = folder.path().join("short.safetensors");
    let valid = safetensors();
    for len in 0..valid.len() {
        assert!(open(&path, &valid[..len]).is_err(), "{len} bytes");
    }
}

fn position(bytes: &[u8], needle: &[u8]) -> usize {
    bytes.windows(needle.len()).position(|w| w == needle).unwrap()
}

#[track_caller]
fn refused(path: &Path, bytes: &[u8], expected: &str) {
    let error = open(path, bytes).unwrap_err().to_string();
    assert!(error.contains(expected), "expected `{expected}` in `{error}`");
}

#[test]
fn gguf_errors_say_what_and_where() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let valid = by_hand(3);
    let check = |at: usize, patch: &[u8], expected: &str| {
        let mut bytes = valid.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        refused(&path, &bytes, expected);
    };
    let after = |needle: &str| position(&valid, needle.as_bytes()) + needle.len();

    check(0, b"GGML", "at byte 0: a GGUF file starts with");
    check(4, &1u32.to_le_bytes(), "at byte 4: GGUF version 1");
    check(4, &3u32.to_be_bytes(), "big-endian");
    check(8, &u64::MAX.to_le_bytes(), "at byte 8: 18446744073709551615 tensors");
    check(16, &(1u64 << 40).to_le_bytes(), "at byte 16: 1099511627776 metadata keys");
    check(24, &70000u64.to_le_bytes(), "at byte 24: a string of 70000 bytes (at most 65535)");
    let text = after("zzz.last_first");
    check(text, &13u32.to_le_bytes(), &format!("at byte {text}: unknown metadata type 13"));
    check(text + 4, &(1u64 << 29).to_le_bytes(), "536870912 bytes expected");
    check(text + 4, &(1u64 << 31).to_le_bytes(), "at most 1073741824");
    check(text + 12, &[0xff], &format!("at byte {}: a string is not UTF-8", text + 12));
    let alignment = after("general.alignment") + 4;
    for bad in [0u32, 48, 1 << 30] {
        check(alignment, &bad.to_le_bytes(), &format!("at byte {alignment}: general.alignment is u32 {bad}"));
    }
    check(after("a.flag") + 4, &[2], "a bool of 2");
    check(after("a.words") + 8, &(1u64 << 35).to_le_bytes(), "34359738368 array elements");
    check(after("a.words") + 4, &99u32.to_le_bytes(), "unknown metadata type 99");
    let flag = after("a.flag") - 14..after("a.flag") + 5;
    let mut twice = valid.clone();
    twice[16] += 1;
    twice.splice(flag.end..flag.end, valid[flag.clone()].iter().copied());
    refused(&path, &twice, &format!("at byte {}: metadata key `a.flag` appears twice", flag.end));

    // Tensor `w`: its name, 2 dims, the extents, the type, the offset.
    let w = position(&valid, &[&1u64.to_le_bytes()[..], b"w", &2u32.to_le_bytes()].concat());
    let dims = w + 9;
    check(dims, &5u32.to_le_bytes(), &format!("at byte {dims}: tensor `w` has 5 dims"));
    check(dims + 4, &31u64.to_le_bytes(), "shape [2, 31] has no size in q8_0");
    check(dims + 4, &(1u64 << 63).to_le_bytes(), "has no size in q8_0");
    check(dims + 20, &16u32.to_le_bytes(), "ggml type 16 (IQ2_XXS) is not supported");
    check(dims + 20, &12u32.to_le_bytes(), "has no size in q4_k (blocks of 256 along the last axis)");
    check(dims + 20, &777u32.to_le_bytes(), "ggml type 777 (unknown) is not supported");
    check(dims + 24, &32u64.to_le_bytes(), "offset 32 is not a multiple of the alignment 64");
    check(dims + 24, &(1u64 << 20).to_le_bytes(), "in a file of");
    check(dims + 24, &(u64::MAX - 63).to_le_bytes(), "in a file of");
    check(dims + 24, &64u64.to_le_bytes(), "tensors `w` and `b` overlap");
    check(dims + 32 + 8, b"w", "tensor `w` appears twice");
}

#[test]
fn arrays_nest_64_deep_and_no_deeper() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let nested = |depth: usize| {
        let head =
            [b"GGUF".to_vec(), 3u32.to_le_bytes().to_vec(), vec![0; 8], 1u64.to_le_bytes().to_vec()].concat();
        let key = [1u64.to_le_bytes().to_vec(), b"k".to_vec(), 9u32.to_le_bytes().to_vec()].concat();
        let mut bytes = [head, key].concat();
        for _ in 1..depth {
            bytes.extend(9u32.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
        }
        bytes.extend(4u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes
    };
    assert!(open(&path, &nested(64)).is_ok());
    refused(&path, &nested(65), "arrays nested over 64 deep");
    refused(&path, &nested(100_000), "arrays nested over 64 deep");
}

#[test]
fn safetensors_errors_list_every_problem() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let file = |header: &str, data: usize| {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
    };
    let good = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert!(open(&path, &file(good, 8)).is_ok());
    refused(&path, &file(good, 9), "1 bytes after the last tensor");
    refused(&path, &file(good, 7), "tensor `a`: bytes 0..8 of 7 bytes");
    refused(&path, &file(&format!(" {good}"), 8), "at byte 8: a safetensors header starts with `{`");
    refused(&path, &(100_000_001u64).to_le_bytes(), "100000001 bytes (at most 100000000 are allowed)");
    refused(&path, &u64::MAX.to_le_bytes(), "are allowed");
    refused(&path, &[1, 2, 3], "3 bytes are too few");
    refused(&path, b"", "0 bytes are too few");
    refused(&path, &file("{\"a\":", 0), "safetensors header: EOF");
    refused(&path, &file(&"{\"a\":".repeat(1 << 16), 0), "safetensors header: ");
    let entry = |name: &str, dtype: &str, shape: &str, offsets: &str| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let duplicate = [entry("a", "F32", "[1]", "[0,4]"), entry("a", "F32", "[1]", "[4,8]")].join(",");
    refused(&path, &file(&format!("{{{duplicate}}}"), 8), "`a` appears twice");
    refused(&path, &file(&format!("{{{}}}", entry("a", "F32", "[-1]", "[0,4]")), 4), "invalid value");

    let many = [
        entry("huge", "F32", "[4294967296,4294967296]", "[0,4]"),
        entry("overlap", "F32", "[1]", "[2,6]"),
        entry("odd", "F8_E4M3", "[2]", "[6,8]"),
        entry("gap", "F32", "[1]", "[9,13]"),
        entry("back", "F32", "[1]", "[13,12]"),
        entry("far", "F32", "[1]", "[13,18446744073709551615]"),
    ];
    let error = open(&path, &file(&format!("{{{}}}", many.join(",")), 13)).unwrap_err();
    let CheckpointError::Problems { problems, .. } = &error else { panic!("{error}") };
    for expected in [
        "`huge`: shape",
        "`overlap`: starts at byte 2",
        "`odd`: type `F8_E4M3`",
        "`gap`: starts at byte 9",
        "`back`: bytes 13..12",
        "`far`: bytes 13..",
    ] {
        assert!(problems.iter().any(|p| p.contains(expected)), "{expected} in {error}");
    }
}
