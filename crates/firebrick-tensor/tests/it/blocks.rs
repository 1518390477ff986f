//! Block formats against what the `gguf` Python package wrote (`tests/golden/make_blocks.py`).

use firebrick_core::Seed;
use firebrick_tensor::block::{DType, decode, encode, encode_weighted};
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, write_gguf};
use rand::RngCore;
use std::collections::BTreeMap;
use std::process::Command;

#[derive(serde::Deserialize)]
struct Goldens {
    encoded: Vec<Case>,
    decoded: BTreeMap<String, Golden>,
}

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
    let goldens: Goldens = serde_json::from_str(include_str!("../golden/blocks.json")).unwrap();
    let mut checked = 0;
    for case in &goldens.encoded {
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
    assert_eq!(checked, 13 * 7);
    for (format, golden) in &goldens.decoded {
        let (dtype, blocks): (DType, _) = (format.parse().unwrap(), bytes(&golden.encoded));
        let mut decoded = vec![0.0; 2 * dtype.block_len()];
        decode(dtype, &blocks, &mut decoded).unwrap();
        assert_eq!(bits(&decoded), bits(&floats(&golden.decoded)), "{format}");
    }
    assert_eq!(goldens.decoded.len(), 7);
}

// Every packed type, on blocks of random bytes; and what the package encodes, on values of all sizes.
#[test]
fn many_random_blocks_equal_the_python_package() {
    let Some(python) = std::env::var_os("FIREBRICK_PYTHON") else {
        eprintln!("skipped: FIREBRICK_PYTHON is not set to a python with gguf");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut rng = Seed(8).stream("blocks");
    let mut tensors: Vec<(TensorSpec, Vec<u8>)> = DType::all()
        .filter(|d| d.is_packed())
        .map(|dtype| {
            let spec = TensorSpec::new(dtype.name(), dtype, [64, 8 * dtype.block_len()]);
            let mut blocks = vec![0; dtype.bytes_for(64 * 8 * dtype.block_len()).unwrap()];
            rng.fill_bytes(&mut blocks);
            (spec, blocks)
        })
        .collect();
    let exponents = Seed(9).normal("exponents", 512 * 256, 2.0);
    let values: Vec<f32> =
        Seed(9).normal("values", 512 * 256, 1.0).iter().zip(exponents).map(|(v, e)| v * e.exp()).collect();
    let raw = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    tensors.push((TensorSpec::new("values", DType::F32, [512, 256]), raw));
    write_gguf(path("ours.gguf"), &Default::default(), &tensors).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/blocks.py");
    let output = Command::new(python).arg(script).args([path("ours.gguf"), path("theirs")]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let ours = Checkpoint::open(path("ours.gguf")).unwrap();
    for (spec, _) in tensors.iter().filter(|(spec, _)| spec.dtype.is_packed()) {
        let theirs = std::fs::read(path(&format!("theirs/{}.decoded", spec.name))).unwrap();
        let theirs = theirs.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let mut finite = 0;
        for (i, (a, b)) in ours.read_f32(&spec.name).unwrap().into_iter().zip(theirs).enumerate() {
            // Which NaN an infinite scale gives is up to the processor.
            assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{}: {i}: {a} {b}", spec.name);
            finite += usize::from(a.is_finite());
        }
        assert!(finite > 64 * 7 * spec.dtype.block_len(), "{}: most scales are finite", spec.name);
    }
    let encoded: Vec<DType> = DType::all()
        .filter(|dtype| {
            let Ok(theirs) = std::fs::read(path(&format!("theirs/{dtype}.encoded"))) else { return false };
            let mut ours = vec![0; theirs.len()];
            encode(*dtype, &values, &mut ours).unwrap();
            assert!(ours == theirs, "{dtype}");
            true
        })
        .collect();
    assert_eq!(encoded, [DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::Q5_0, DType::Q5_1]);
}

/// Squared error that `importance` weighs, relative to the values' squares.
fn error(dtype: DType, values: &[f32], importance: &[f32], encoded: &[u8]) -> f64 {
    let mut decoded = vec![0.0; values.len()];
    decode(dtype, encoded, &mut decoded).unwrap();
    let square = |a: f32, i: usize| f64::from(a).powi(2) * f64::from(importance[i % importance.len()]);
    let error: f64 = values.iter().zip(&decoded).enumerate().map(|(i, (a, b))| square(a - b, i)).sum();
    error / values.iter().enumerate().map(|(i, a)| square(*a, i)).sum::<f64>()
}

#[test]
fn errors_on_normal_weights_fall_with_the_bits() {
    let values = Seed(0).normal("weights", 512 * 768, 1.0);
    // Relative mean squared errors as measured here, by bits per value.
    let measured = [
        (DType::Q2K, 0.0687),
        (DType::Q3K, 0.0207),
        (DType::Iq4Xs, 0.00565),
        (DType::Iq4Nl, 0.00556),
        (DType::Q4K, 0.00491),
        (DType::Q5K, 0.001197),
        (DType::Q6K, 2.997e-4),
        (DType::Q8_0, 2.88e-5),
    ];
    let mut last = f64::MAX;
    for (dtype, expected) in measured {
        let mut encoded = vec![0; dtype.bytes_for(values.len()).unwrap()];
        encode(dtype, &values, &mut encoded).unwrap();
        let found = error(dtype, &values, &[1.0], &encoded);
        eprintln!("{dtype}: {found:.3e} at {} bits", dtype.bits_per_element());
        assert!((found / expected - 1.0).abs() < 0.02, "{dtype}: {found}, expected {expected}");
        assert!(found < last, "{dtype}: {found} after {last}");
        last = found;
    }
}

#[test]
fn importance_moves_the_error_to_where_it_costs_less() {
    let (rows, columns) = (64, 512);
    let values = Seed(3).normal("weights", rows * columns, 0.02);
    let importance: Vec<f32> = Seed(3).normal("importance", columns, 1.5).iter().map(|v| v.exp()).collect();
    for dtype in DType::all().filter(|d| d.is_packed()) {
        let mut plain = vec![0; dtype.bytes_for(values.len()).unwrap()];
        let (mut weighted, mut even) = (plain.clone(), plain.clone());
        encode(dtype, &values, &mut plain).unwrap();
        encode_weighted(dtype, &values, &importance, &mut weighted).unwrap();
        encode_weighted(dtype, &values, &[7.0; 512], &mut even).unwrap();
        let of = |bytes: &[u8]| error(dtype, &values, &importance, bytes);
        if dtype == DType::Q8_0 {
            assert!(weighted == plain, "it has no weighted encoder");
            continue;
        }
        assert!(of(&weighted) < 0.97 * of(&even), "{dtype}: {} against {}", of(&weighted), of(&even));
        let plainly = |bytes: &[u8]| error(dtype, &values, &[1.0], bytes);
        assert!(plainly(&even) < plainly(&weighted), "control: {dtype}: another measure, another winner");
        assert!(plainly(&even) <= 1.001 * plainly(&plain), "{dtype}: a search is no worse than the range");
        // Nothing to go by: all columns count the same.
        encode_weighted(dtype, &values, &[f32::NAN; 512], &mut weighted).unwrap();
        assert!(weighted == even, "{dtype}");
    }
    let mut out = vec![0; DType::Q4K.bytes_for(values.len()).unwrap()];
    for wrong in [0, 100, 256 * 3] {
        assert!(encode_weighted(DType::Q4K, &values, &vec![1.0; wrong], &mut out).is_err(), "{wrong}");
    }
}

#[test]
fn zeros_constants_and_extremes_survive_every_packed_type() {
    for dtype in DType::all().filter(|d| d.is_packed()) {
        for value in [0.0f32, 1e-30, -1e-8, 1e-4, -0.5, 3.0, -2e3] {
            for rest in [value, 0.0] {
                let mut values = vec![rest; 256];
                values[17] = value;
                let mut encoded = vec![0; dtype.bytes_for(256).unwrap()];
                let mut decoded = vec![f32::NAN; 256];
                encode(dtype, &values, &mut encoded).unwrap();
                decode(dtype, &encoded, &mut decoded).unwrap();
                let worst = values.iter().zip(&decoded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // A tenth of the value, and what an f16 cannot tell from 0.
                assert!(worst <= 0.1 * value.abs() + 1e-5, "{dtype}: {value} and {rest}: {worst}");
            }
        }
    }
}
