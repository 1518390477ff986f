//! all-MiniLM-L6-v2 against transformers: `tests/golden/minilm.json`, made by `tests/golden/minilm.py`.

use burn::tensor::Device;
use firebrick_core::Silent;
use firebrick_models::{EmbedOptions, EncoderModel, Pooling, cosine};
use serde_json::Value;

#[test]
fn vectors_equal_transformers() {
    let Some(path) = crate::minilm() else { return };
    let model = EncoderModel::open(&path, &Device::flex()).unwrap();
    assert_eq!((model.sentence.pooling, model.sentence.normalize), (Pooling::Mean, true));
    assert_eq!(model.max_tokens(), 256);
    let golden: Value = serde_json::from_str(include_str!("../golden/minilm.json")).unwrap();
    let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(texts.len(), 20);
    for (text, expected) in texts.iter().zip(golden["ids"].as_array().unwrap()) {
        let ids = model.tokens(text).unwrap();
        match expected.as_array() {
            Some(expected) => assert!(expected.iter().map(|v| v.as_u64().unwrap() as u32).eq(ids), "{text}"),
            None => assert_eq!(expected.as_u64().unwrap() as usize, ids.len(), "a text that is cut off"),
        }
    }
    let expected: Vec<Vec<f32>> = golden["vectors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32 * 1e-5).collect())
        .collect();
    let embed = |texts: &[&str], options| model.embed(texts, &[], &options, &Silent).unwrap();
    let found = embed(&texts, EmbedOptions { batch: 8, ..EmbedOptions::default() });
    let (mut lowest, mut largest) = (1.0f64, 0.0f32);
    for (a, b) in found.iter().zip(&expected) {
        lowest = lowest.min(cosine(a, b));
        largest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(largest, f32::max);
    }
    println!("lowest cosine 1 - {:.1e}, largest difference {largest:.1e}", 1.0 - lowest);
    assert!(lowest >= 0.99999, "lowest cosine {lowest}");
    assert!(largest < 5e-5, "largest difference {largest}");
    // The first two sentences mean nearly the same, the first and the eleventh do not.
    let (near, far) = (cosine(&found[0], &found[1]), cosine(&found[0], &found[10]));
    assert!(near > 0.6 && far < 0.2, "{near} {far}");
    let first = embed(&texts[..1], EmbedOptions { pooling: Some(Pooling::Cls), ..EmbedOptions::default() });
    assert!(cosine(&first[0], &expected[0]) < 0.999, "control: another pooling is another vector");
}
