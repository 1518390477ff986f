use firebrick_tensor::block::{DType, decode, encode};
use firebrick_tensor::checkpoint::Checkpoint;
use std::collections::BTreeMap;
use std::time::Instant;

#[test]
fn temporary_by_hand() {
    let Some(path) = std::env::var_os("FB_HAND") else { return };
    let t = Instant::now();
    let c = Checkpoint::open(&path).unwrap();
    println!("open {:?}", t.elapsed());
    for (k, v) in &c.gguf().unwrap().metadata {
        println!("{k} = {}", v.summary());
    }
    let mut by: BTreeMap<DType, (usize, usize)> = BTreeMap::new();
    for t in c.tensors() {
        let e = by.entry(t.dtype).or_default();
        e.0 += 1;
        e.1 += t.len;
    }
    println!("{by:?}");
    for t in c.tensors().iter().take(12) {
        println!("{} {} {:?} {}", t.name, t.dtype, t.shape, t.offset);
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.gguf");
    let t = Instant::now();
    super::gguf::rewrite(&c, &out);
    println!("rewrite {:?} same {}", t.elapsed(), std::fs::read(&out).unwrap() == std::fs::read(&path).unwrap());
    let n = 1 << 20;
    let x: Vec<f32> = (0..n).map(|i| ((i as f32) * 0.7311).sin() * ((i % 97) as f32 - 48.0)).collect();
    let mut y = vec![0f32; n];
    for d in [DType::F32, DType::F16, DType::BF16, DType::Q4_0, DType::Q4_1, DType::Q8_0] {
        let mut b = vec![0u8; d.bytes_for(n).unwrap()];
        encode(d, &x, &mut b).unwrap();
        let t = Instant::now();
        for _ in 0..20 {
            encode(d, &x, &mut b).unwrap();
        }
        let e = t.elapsed().as_secs_f64() / 20.0;
        let t = Instant::now();
        for _ in 0..20 {
            decode(d, &b, &mut y).unwrap();
        }
        let f = t.elapsed().as_secs_f64() / 20.0;
        println!("{d}: encode {:.2} Gelem/s decode {:.2} Gelem/s", n as f64 / e / 1e9, n as f64 / f / 1e9);
    }
}
