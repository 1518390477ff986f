//! The streaming writer.

use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{CheckpointError, Layout, TensorSpec, TensorWriter};

fn specs() -> [TensorSpec; 4] {
    [
        TensorSpec::new("none", DType::F32, [0]),
        TensorSpec::new("a", DType::F16, [3]),
        TensorSpec::new("nothing", DType::F32, [2, 0]),
        TensorSpec::new("b", DType::F16, [2]),
    ]
}

#[test]
fn parts_and_wholes_give_the_same_bytes() {
    let layout = Layout::gguf(&Default::default(), &specs()).unwrap();
    let mut whole = TensorWriter::new(Vec::new(), layout.clone()).unwrap();
    whole.write("a", &[1, 2, 3, 4, 5, 6]).unwrap();
    whole.write("nothing", &[]).unwrap();
    whole.write("b", &[7, 8, 9, 10]).unwrap();
    let whole = whole.finish().unwrap();
    assert_eq!(whole.len() as u64, layout.file_len());
    for tensor in layout.tensors().iter().filter(|t| t.len > 0) {
        assert!(tensor.offset.is_multiple_of(32));
        let first = if tensor.name == "a" { 1 } else { 7 };
        let expected: Vec<u8> = (first..).take(tensor.len).collect();
        assert_eq!(whole[tensor.offset as usize..][..tensor.len], expected);
    }

    let mut parts = TensorWriter::new(Vec::new(), layout).unwrap();
    for (name, bytes) in
        [("a", &[1, 2][..]), ("a", &[3]), ("a", &[4, 5, 6]), ("b", &[]), ("b", &[7, 8, 9]), ("b", &[10])]
    {
        parts.write(name, bytes).unwrap();
    }
    assert_eq!(parts.finish().unwrap(), whole);
}

#[test]
fn wrong_order_or_amount_is_refused() {
    let layout = Layout::safetensors(&Default::default(), &specs()).unwrap();
    let mut writer = TensorWriter::new(Vec::new(), layout).unwrap();
    let refused = |result: Result<(), CheckpointError>| match result.unwrap_err() {
        CheckpointError::Write { tensor, what } => format!("{tensor}: {what}"),
        other => panic!("{other}"),
    };
    assert_eq!(refused(writer.write("b", &[1])), "b: `a` is due, 0 of 6 bytes written");
    assert_eq!(refused(writer.write("c", &[])), "c: `a` is due, 0 of 6 bytes written");
    writer.write("a", &[0; 5]).unwrap();
    assert_eq!(writer.due().map(|(t, done)| (t.name.as_str(), done)), Some(("a", 5)));
    assert_eq!(refused(writer.write("a", &[0; 2])), "a: 2 bytes after 5 of 6");
    writer.write("a", &[0]).unwrap();
    writer.write("b", &[0; 4]).unwrap();
    assert_eq!(refused(writer.write("b", &[1])), "b: every tensor is written");
    assert!(writer.due().is_none());
    writer.finish().unwrap();
}

#[test]
fn an_incomplete_file_does_not_finish() {
    let layout = Layout::safetensors(&Default::default(), &specs()).unwrap();
    let mut writer = TensorWriter::new(Vec::new(), layout).unwrap();
    writer.write("a", &[0; 6]).unwrap();
    let error = writer.finish().unwrap_err();
    assert_eq!(error.to_string(), "writing tensor `b`: 0 of 4 bytes written");
}
