//! Safetensors against the reference crate, both ways.

use super::{strings, tensors};
use ::safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{
    Checkpoint, CheckpointError, Format, Layout, TensorSpec, write_safetensors,
};
use proptest::prelude::*;
use std::collections::HashMap;

fn dtypes() -> Vec<DType> {
    DType::all().filter(|d| d.safetensors_name().is_some()).collect()
}

fn theirs(dtype: DType) -> Dtype {
    serde_json::from_value(dtype.safetensors_name().unwrap().into()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_reference_crate_reads_what_we_write(tensors in tensors(dtypes(), "\\PC{1,12}"), note in "\\PC{0,20}") {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write_safetensors(&path, &strings(&[("note", &note)]), &tensors).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        prop_assert_eq!(header % 8, 0);
        let expected = HashMap::from([("format".into(), "pt".into()), ("note".into(), note.clone())]);
        prop_assert_eq!(metadata.metadata(), &Some(expected));
        let read = SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(read.len(), tensors.len());
        for (spec, data) in &tensors {
            let view = read.tensor(&spec.name).unwrap();
            prop_assert_eq!((view.dtype(), view.shape(), view.data()), (theirs(spec.dtype), &spec.shape[..], &data[..]));
            let size = spec.dtype.block_bytes();
            let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            prop_assert!(at.is_multiple_of(size), "{} of {} at {}", spec.name, spec.dtype, at);
        }

        let ours = Checkpoint::open(&path).unwrap();
        prop_assert_eq!(ours.format(), Format::Safetensors);
        prop_assert_eq!(ours.metadata(), &strings(&[("format", "pt"), ("note", &note)]));
        for (spec, data) in &tensors {
            prop_assert_eq!(&ours.get(&spec.name).unwrap().spec(), spec);
            prop_assert_eq!(ours.bytes(&spec.name).unwrap(), &data[..]);
        }
    }

    #[test]
    fn we_read_what_the_reference_crate_writes(tensors in tensors(dtypes(), "\\PC{1,12}")) {
        let views = tensors.iter().map(|(s, data)| (&s.name, TensorView::new(theirs(s.dtype), s.shape.clone(), data).unwrap()));
        let bytes = serialize(views, Some(HashMap::from([("a".into(), "b".into())]))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("any.name");
        std::fs::write(&path, &bytes).unwrap();
        let ours = Checkpoint::open(&path).unwrap();
        prop_assert_eq!(ours.tensors().len(), tensors.len());
        prop_assert_eq!(ours.metadata(), &strings(&[("a", "b")]));
        prop_assert!(ours.tensors().is_sorted_by_key(|t| t.offset));
        for (spec, data) in &tensors {
            prop_assert_eq!(&ours.tensor(&spec.name).unwrap().spec(), spec);
            prop_assert_eq!(ours.bytes(&spec.name).unwrap(), &data[..]);
        }
    }
}

#[test]
fn ranges_decode_and_bad_ones_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let values: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let tensors = [
        (TensorSpec::new("w", DType::F32, [2, 3]), values),
        (TensorSpec::new("ids", DType::I64, [1]), vec![7, 0, 0, 0, 0, 0, 0, 0]),
    ];
    write_safetensors(&path, &Default::default(), &tensors).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    // The wider type comes first in the file.
    assert_eq!(checkpoint.tensors().iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["ids", "w"]);
    assert_eq!(checkpoint.read_f32("w").unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let mut row = [0.0; 3];
    checkpoint.read_f32_into("w", 3..6, &mut row).unwrap();
    assert_eq!(row, [3.0, 4.0, 5.0]);

    let outside = checkpoint.read_f32_into("w", 4..7, &mut row).unwrap_err();
    assert!(matches!(outside, CheckpointError::Range { start: 4, end: 7, elements: 6, .. }), "{outside}");
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = checkpoint.read_f32_into("w", 3..0, &mut row).unwrap_err();
    assert!(matches!(reversed, CheckpointError::Range { .. }), "{reversed}");
    assert!(checkpoint.read_f32_into("w", 0..2, &mut row).is_err());
    let integers = checkpoint.read_f32("ids").unwrap_err().to_string();
    assert!(integers.ends_with("tensor `ids`: i64 holds integers, not real numbers"), "{integers}");
    let missing = checkpoint.bytes("v").unwrap_err().to_string();
    assert!(missing.contains("model.safetensors: no tensor named `v`"), "{missing}");
}

#[test]
fn bytes_of_the_program_read_like_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let tensors = [(TensorSpec::new("w", DType::U8, [40_000]), vec![9; 40_000])];
    write_safetensors(&path, &Default::default(), &tensors).unwrap();
    let bytes: &'static [u8] = std::fs::read(&path).unwrap().leak();
    let (mapped, built_in) =
        (Checkpoint::open(&path).unwrap(), Checkpoint::from_static(bytes, "embedded").unwrap());
    assert_eq!(mapped.tensors(), built_in.tensors());
    for checkpoint in [mapped, built_in] {
        assert_eq!(checkpoint.bytes("w").unwrap(), tensors[0].1);
    }
    let error = Checkpoint::from_static(&bytes[..9], "embedded").unwrap_err().to_string();
    assert!(error.starts_with("embedded: at byte 0"), "{error}");
}

#[test]
fn a_layout_lists_every_problem() {
    let specs = [
        TensorSpec::new("a", DType::F32, [2]),
        TensorSpec::new("a", DType::F32, [2]),
        TensorSpec::new("", DType::F32, [2]),
        TensorSpec::new("q", DType::Q4_0, [32]),
        TensorSpec::new("big", DType::F32, [usize::MAX]),
        TensorSpec::new("__metadata__", DType::F32, [1]),
    ];
    let error = Layout::safetensors(&Default::default(), &specs).unwrap_err();
    let CheckpointError::Layout { problems } = &error else { panic!("{error}") };
    assert_eq!(problems.len(), 5, "{error}");
}
