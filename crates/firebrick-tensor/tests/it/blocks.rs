//! Block formats against what the `gguf` Python package wrote (`tests/golden/make_blocks.py`).

use firebrick_tensor::block::{DType, decode, encode};
use std::collections::BTreeMap;

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    values: String,
    formats: BTreeMap<String, Golden>,
}

#[derive(serde::Deserialize)]
struct Golden {
    encoded: String,
    decoded: String,
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn floats(hex: &str) -> Vec<f32> {
    bytes(hex).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_format_equals_the_python_package_bit_for_bit() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../golden/blocks.json")).unwrap();
    let mut checked = 0;
    for case in &cases {
        let values = floats(&case.values);
        for (format, golden) in &case.formats {
            let dtype: DType = format.parse().unwrap();
            let label = format!("{format}, {}", case.name);
            let expected = bytes(&golden.encoded);
            let mut encoded = vec![0; dtype.bytes_for(values.len()).unwrap()];
            encode(dtype, &values, &mut encoded).unwrap();
            assert_eq!(encoded, expected, "{label}");
            let mut decoded = vec![0.0; values.len()];
            decode(dtype, &expected, &mut decoded).unwrap();
            assert_eq!(bits(&decoded), bits(&floats(&golden.decoded)), "{label}");
            checked += 1;
        }
    }
    assert_eq!(checked, 13 * 5);
}
