//! Importance matrices, both file formats.

use firebrick_core::Seed;
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::gguf::Metadata;
use firebrick_tensor::checkpoint::{TensorSpec, write_gguf};
use firebrick_tensor::imatrix::{Importance, ImportanceMatrix};
use rand::Rng;
use std::collections::BTreeMap;
use std::path::Path;

fn sample() -> ImportanceMatrix {
    let one = Importance { sums: vec![8.0, 0.0, 2.0, 6.0], counts: vec![4.0] };
    let experts = Importance { sums: vec![3.0, 9.0, 5.0, 5.0], counts: vec![3.0, 0.0] };
    let entries = [("blk.0.attn_q.weight", one), ("blk.0.ffn_up_exps.weight", experts)];
    ImportanceMatrix {
        entries: BTreeMap::from(entries.map(|(name, entry)| (name.to_owned(), entry))),
        datasets: vec!["some text".into()],
        chunks: 2,
        chunk_size: 512,
    }
}

/// An old file, as llama.cpp wrote them.
fn dat() -> Vec<u8> {
    let int = |i: i32| i.to_le_bytes().to_vec();
    let entry = |name: &str, calls: i32, values: &[f32]| {
        let values: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        [int(name.len() as i32), name.into(), int(calls), int(values.len() as i32 / 4), values].concat()
    };
    let entries = [entry("blk.0.attn_q.weight", 4, &[8.0, 0.0, 2.0, 6.0]), entry("unused", 0, &[7.0, 5.0])];
    [int(2), entries.concat(), int(17), int(4), b"wiki".to_vec()].concat()
}

#[test]
fn a_matrix_survives_its_file_and_gives_mean_squares() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("imatrix.gguf");
    sample().write(&path).unwrap();
    let back = ImportanceMatrix::read(&path).unwrap();
    assert_eq!(back, sample());
    let of = |name: &str, expert| back.entries[name].means(expert);
    assert_eq!(of("blk.0.attn_q.weight", 0), Some(vec![2.0, 0.0, 0.5, 1.5]));
    assert_eq!(of("blk.0.attn_q.weight", 1), None);
    assert_eq!(of("blk.0.ffn_up_exps.weight", 0), Some(vec![1.0, 3.0]));
    assert_eq!(of("blk.0.ffn_up_exps.weight", 1), Some(vec![1.0, 1.0]), "no token came to this expert");

    let old = folder.path().join("old.dat");
    std::fs::write(&old, dat()).unwrap();
    let old = ImportanceMatrix::read(&old).unwrap();
    assert_eq!(old.entries["blk.0.attn_q.weight"], sample().entries["blk.0.attn_q.weight"]);
    assert_eq!(old.entries["unused"].means(0), Some(vec![1.0, 1.0]));
    assert_eq!((old.chunks, old.datasets), (17, vec!["wiki".to_owned()]));

    let mut wrong = sample();
    wrong.entries.get_mut("blk.0.attn_q.weight").unwrap().sums[1] = f32::NAN;
    wrong.entries.insert("odd".into(), Importance { sums: vec![1.0; 3], counts: vec![1.0, 2.0] });
    let error = wrong.write(folder.path().join("never.gguf")).unwrap_err().to_string();
    assert!(error.contains("sum 1 is NaN") && error.contains("`odd`: 3 sums for 2 counts"), "{error}");
    assert!(!folder.path().join("never.gguf").exists());
}

#[track_caller]
fn refused(path: &Path, bytes: &[u8], expected: &str) {
    std::fs::write(path, bytes).unwrap();
    let error = ImportanceMatrix::read(path).unwrap_err().to_string();
    assert!(error.contains(expected) && error.contains(path.to_str().unwrap()), "`{expected}` in `{error}`");
}

#[test]
fn hostile_old_files_are_refused_with_a_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.dat");
    let valid = dat();
    let check = |at: usize, patch: &[u8], expected: &str| {
        let mut bytes = valid.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        refused(&path, &bytes, expected);
    };
    check(0, &i32::MAX.to_le_bytes(), "at byte 0: 2147483647 entries");
    check(0, &(-1i32).to_le_bytes(), "at byte 0: -1 entries");
    check(0, &0i32.to_le_bytes(), "");
    check(4, &i32::MAX.to_le_bytes(), "at byte 4: 2147483647 bytes of a name");
    check(4, &0i32.to_le_bytes(), "at byte 4: a name of 0 bytes");
    check(8, &[0xff], "at byte 8: a name is not UTF-8");
    let values = 8 + "blk.0.attn_q.weight".len() + 4;
    check(values, &i32::MAX.to_le_bytes(), &format!("at byte {values}: 2147483647 values"));
    check(values + 4, &f32::INFINITY.to_le_bytes(), "sum 0 is inf");
    check(values + 8, &(-1f32).to_le_bytes(), "sum 1 is -1");
    refused(&path, &[&valid[..], b"x"].concat(), "1 bytes after the end");
    refused(&path, b"", "4 bytes expected, 0 left");
    refused(&path, &0i32.to_le_bytes(), "holds no importances");
    // Without the trailer it is a whole file of an even older version.
    let whole = valid.len() - 12;
    for len in (0..valid.len()).filter(|len| *len != whole) {
        std::fs::write(&path, &valid[..len]).unwrap();
        assert!(ImportanceMatrix::read(&path).is_err(), "{len} bytes");
    }
    std::fs::write(&path, &valid[..whole]).unwrap();
    assert_eq!(ImportanceMatrix::read(&path).unwrap().chunks, 0);
    let mut rng = Seed(5).stream("imatrix");
    for _ in 0..400 {
        let mut bytes = valid.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(found) = ImportanceMatrix::read(&path) {
            assert!(found.entries.values().all(|e| e.means(0).is_some()), "what opens can be used");
        }
    }
}

#[test]
fn hostile_gguf_files_are_refused_with_every_problem() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let write = |kind: &str, tensors: &[(&str, DType, &[f32])]| {
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, dtype, values)| {
                let spec = TensorSpec::new(*name, *dtype, [values.len()]);
                (spec, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
            })
            .collect();
        write_gguf(&path, &Metadata::from([("general.type".to_owned(), kind.into())]), &tensors).unwrap();
        ImportanceMatrix::read(&path).map_err(|e| e.to_string())
    };
    assert!(write("imatrix", &[("a.in_sum2", DType::F32, &[1.0]), ("a.counts", DType::F32, &[2.0])]).is_ok());
    let error = write(
        "model",
        &[
            ("a.in_sum2", DType::F32, &[1.0]),
            ("b.counts", DType::F32, &[1.0]),
            ("c.in_sum2", DType::I32, &[1.0]),
            ("c.counts", DType::F32, &[1.0]),
            ("d.weight", DType::F32, &[1.0]),
            ("e.in_sum2", DType::F32, &[1.0, 2.0, 3.0]),
            ("e.counts", DType::F32, &[1.0, 1.0]),
            ("f.in_sum2", DType::F32, &[f32::NAN]),
            ("f.counts", DType::F32, &[-1.0]),
        ],
    )
    .unwrap_err();
    for expected in [
        "general.type is not `imatrix`",
        "`a` has no .counts",
        "`b` has no .in_sum2",
        "`c.in_sum2` is i32",
        "`c` has no .in_sum2",
        "`d.weight` ends in neither",
        "`e`: 3 sums for 2 counts",
        "`f`: sum 0 is NaN",
        "`f`: count 0 is -1",
    ] {
        assert!(error.contains(expected), "`{expected}` in `{error}`");
    }
    assert!(write("imatrix", &[]).unwrap_err().contains("holds no importances"));
}
