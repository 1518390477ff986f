//! GGUF: round trips, and a file put together by hand.

use super::{Tensor, tensors};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::gguf::{Array, Metadata, Strings};
use firebrick_tensor::checkpoint::{
    Checkpoint, CheckpointError, Format, Gguf, Layout, TensorSpec, Value, write_gguf,
};
use proptest::prelude::*;
use std::path::Path;

fn dtypes() -> Vec<DType> {
    DType::all().filter(|d| d.ggml_id().is_some()).collect()
}

fn array() -> impl Strategy<Value = Array> {
    fn list<T: std::fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
        prop::collection::vec(of, 0..4)
    }
    let leaf = prop_oneof![
        list(any::<u8>()).prop_map(Array::U8),
        list(any::<i8>()).prop_map(Array::I8),
        list(any::<u16>()).prop_map(Array::U16),
        list(any::<i16>()).prop_map(Array::I16),
        list(any::<u32>()).prop_map(Array::U32),
        list(any::<i32>()).prop_map(Array::I32),
        list(-1e9f32..1e9).prop_map(Array::F32),
        list(any::<bool>()).prop_map(Array::Bool),
        list("\\PC{0,6}").prop_map(|s| Array::String(s.into_iter().collect())),
        list(any::<u64>()).prop_map(Array::U64),
        list(any::<i64>()).prop_map(Array::I64),
        list(-1e99f64..1e99).prop_map(Array::F64),
    ];
    leaf.prop_recursive(4, 16, 3, |inner| prop::collection::vec(inner, 0..3).prop_map(Array::Array))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        (-1e9f32..1e9).prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        "\\PC{0,20}".prop_map(Value::String),
        array().prop_map(Value::Array),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        (-1e99f64..1e99).prop_map(Value::F64),
    ]
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let alignment = prop::option::of(prop::sample::select(vec![1u32, 8, 32, 64, 256]));
    (prop::collection::vec(("[a-z.]{1,10}", value()), 0..8), alignment).prop_map(|(pairs, alignment)| {
        let mut metadata: Metadata = pairs.into_iter().collect();
        metadata.extend(alignment.map(|a| ("general.alignment".to_owned(), Value::U32(a))));
        metadata
    })
}

/// Writes again what was read.
pub fn rewrite(checkpoint: &Checkpoint, to: &Path) {
    let tensors: Vec<(TensorSpec, &[u8])> =
        checkpoint.tensors().iter().map(|t| (t.spec(), checkpoint.bytes(&t.name).unwrap())).collect();
    write_gguf(to, &checkpoint.gguf().unwrap().metadata, &tensors).unwrap();
}

fn check_round_trip(metadata: &Metadata, tensors: &[Tensor]) {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
    write_gguf(&first, metadata, tensors).unwrap();
    let checkpoint = Checkpoint::open(&first).unwrap();
    assert_eq!(checkpoint.format(), Format::Gguf);
    let gguf = checkpoint.gguf().unwrap();
    assert_eq!(&gguf.metadata, metadata);
    assert!(gguf.metadata.keys().eq(metadata.keys()), "order");
    assert_eq!(checkpoint.tensors().len(), tensors.len());
    for (read, (spec, bytes)) in checkpoint.tensors().iter().zip(tensors) {
        assert_eq!(&read.spec(), spec);
        assert!(read.offset.is_multiple_of(gguf.alignment));
        assert_eq!(checkpoint.bytes(&read.name).unwrap(), bytes);
    }
    rewrite(&checkpoint, &second);
    assert_eq!(std::fs::read(first).unwrap(), std::fs::read(second).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn everything_comes_back(metadata in metadata(), tensors in tensors(dtypes(), "[a-z0-9._]{1,20}")) {
        check_round_trip(&metadata, &tensors);
    }
}

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

/// A file as the format's text describes it, not by our writer.
pub fn by_hand(version: u32) -> Vec<u8> {
    let u32 = |x: u32| x.to_le_bytes().to_vec();
    let u64 = |x: u64| x.to_le_bytes().to_vec();
    let mut bytes = [
        b"GGUF".to_vec(),
        u32(version),
        u64(2), // tensors
        u64(5), // keys
        [string("zzz.last_first"), u32(8), string("é")].concat(),
        [string("general.alignment"), u32(4), u32(64)].concat(),
        [string("a.nested"), u32(9), u32(9), u64(2)].concat(),
        [u32(5), u64(2), u32(-1i32 as u32), u32(7)].concat(),
        [u32(8), u64(1), string("x")].concat(),
        [string("a.flag"), u32(7), vec![1]].concat(),
        [string("a.words"), u32(9), u32(8), u64(3), string("one"), string(""), string("three")].concat(),
        // A 2 by 32 matrix: the innermost extent comes first.
        [string("w"), u32(2), u64(32), u64(2), u32(8), u64(0)].concat(),
        [string("b"), u32(1), u64(2), u32(0), u64(128)].concat(),
    ]
    .concat();
    bytes.resize(bytes.len().next_multiple_of(64), 0);
    for row in 0..2u8 {
        bytes.extend([0x00, 0x3c]); // an f16 of 1.0
        bytes.extend((0..32).map(|i| i + row));
    }
    bytes.resize(bytes.len().next_multiple_of(64), 0);
    bytes.extend(1.5f32.to_le_bytes());
    bytes.extend((-2.0f32).to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(64), 0);
    bytes
}

#[test]
fn a_file_by_hand_is_read_and_written_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("no extension"), folder.path().join("b.gguf"));
    std::fs::write(&first, by_hand(3)).unwrap();
    let checkpoint = Checkpoint::open(&first).unwrap();
    let gguf = checkpoint.gguf().unwrap();
    assert_eq!((gguf.version, gguf.alignment), (3, 64));
    let keys: Vec<&String> = gguf.metadata.keys().collect();
    assert_eq!(keys, ["zzz.last_first", "general.alignment", "a.nested", "a.flag", "a.words"]);
    assert_eq!(gguf.str("zzz.last_first").unwrap(), "é");
    assert!(gguf.bool("a.flag").unwrap());
    let words: Vec<&str> = gguf.strings("a.words").unwrap().iter().collect();
    assert_eq!(words, ["one", "", "three"]);
    let inner = Array::Array(vec![Array::I32(vec![-1, 7]), Array::String(Strings::from_iter(["x"]))]);
    assert_eq!(gguf.get("a.nested"), Some(&Value::Array(inner)));

    let w = checkpoint.tensor("w").unwrap();
    assert_eq!((w.dtype, &w.shape[..], w.len), (DType::Q8_0, &[2, 32][..], 68));
    let values = checkpoint.read_f32("w").unwrap();
    assert_eq!((values[0], values[31], values[32], values[63]), (0.0, 31.0, 1.0, 32.0));
    let mut row = [0.0; 32];
    checkpoint.read_f32_into("w", 32..64, &mut row).unwrap();
    assert_eq!(row, values[32..]);
    let partial = checkpoint.read_f32_into("w", 16..48, &mut row).unwrap_err().to_string();
    assert!(
        partial.ends_with("tensor `w`: 16 elements of q8_0 are not a whole number of blocks of 32"),
        "{partial}"
    );
    assert_eq!(checkpoint.read_f32("b").unwrap(), [1.5, -2.0]);

    rewrite(&checkpoint, &second);
    assert_eq!(std::fs::read(second).unwrap(), by_hand(3));

    std::fs::write(&first, by_hand(2)).unwrap();
    assert_eq!(Checkpoint::open(&first).unwrap().gguf().unwrap().version, 2);
}

fn gguf(pairs: Vec<(&str, Value)>) -> Gguf {
    let metadata = pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    Gguf { path: "m.gguf".into(), version: 3, alignment: 32, metadata }
}

#[test]
fn typed_getters_convert_what_fits_and_name_what_does_not() {
    let gguf = gguf(vec![
        ("count", Value::U16(30)),
        ("wide", Value::I64(30)),
        ("negative", Value::I32(-1)),
        ("base", Value::F64(1e4)),
        ("types", Array::U8(vec![1, 2]).into()),
        ("huge", Array::U64(vec![1, 1 << 40]).into()),
        ("name", "llama".into()),
        ("flag", true.into()),
    ]);
    assert_eq!((gguf.u32("count").unwrap(), gguf.u32("wide").unwrap()), (30, 30));
    assert_eq!(gguf.f32("base").unwrap(), 1e4);
    assert_eq!(gguf.i32s("types").unwrap(), [1, 2]);
    assert_eq!(gguf.optional("none", Gguf::f32).unwrap(), None);
    assert_eq!(gguf.optional("count", Gguf::u32).unwrap(), Some(30));
    assert!(gguf.optional("name", Gguf::u32).is_err());

    let error = |e: CheckpointError| e.to_string();
    assert_eq!(
        error(gguf.u32("negative").unwrap_err()),
        "m.gguf: metadata key `negative` is i32 -1, an integer that fits u32 expected"
    );
    assert_eq!(
        error(gguf.u32("llama.block_count").unwrap_err()),
        "m.gguf: no metadata key `llama.block_count` (an integer that fits u32 expected)"
    );
    assert!(error(gguf.i32s("huge").unwrap_err()).contains("array of 2 u64"));
    assert!(error(gguf.f32("flag").unwrap_err()).contains("bool true"));
    assert!(error(gguf.str("count").unwrap_err()).contains("a string expected"));
    assert!(error(gguf.strings("name").unwrap_err()).contains("string \"llama\""));
    assert!(gguf.bool("name").is_err());
}

#[test]
fn a_large_vocabulary_is_read_quickly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vocabulary.gguf");
    let words: Strings = (0..150_000).map(|i| format!("word{i}")).collect();
    let metadata =
        Metadata::from([("tokenizer.ggml.tokens".to_owned(), Value::Array(Array::String(words.clone())))]);
    write_gguf(&path, &metadata, &[] as &[Tensor]).unwrap();
    let start = std::time::Instant::now();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let read = checkpoint.gguf().unwrap().strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!(read, &words);
    assert_eq!(read.get(149_999), Some("word149999"));
    assert_eq!(read.get(150_000), None);
    assert!(start.elapsed().as_secs() < 5);
}

#[test]
fn a_layout_lists_every_problem() {
    let metadata = Metadata::from([
        ("general.alignment".to_owned(), Value::U32(48)),
        (String::new(), Value::U8(0)),
        (
            "deep".to_owned(),
            Value::Array((0..64).fold(Array::U8(vec![]), |inner, _| Array::Array(vec![inner]))),
        ),
    ]);
    let specs = [
        TensorSpec::new("x".repeat(64), DType::F32, [1]),
        TensorSpec::new("u", DType::U8, [1]),
        TensorSpec::new("d", DType::F32, [1, 1, 1, 1, 1]),
        TensorSpec::new("q", DType::Q4_0, [32, 31]),
        TensorSpec::new("q", DType::Q4_0, [31, 32]),
    ];
    let error = Layout::gguf(&metadata, &specs).unwrap_err();
    let CheckpointError::Layout { problems } = &error else { panic!("{error}") };
    assert_eq!(problems.len(), 8, "{error}");
}
