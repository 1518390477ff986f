//! Gemma 3 270M, as people have it in GGUF (Q4_K_M), against transformers: `tests/golden/gemma3.json`, made by `tests/golden/gemma3.py`.

use std::ops::ControlFlow;

use burn::tensor::Device;
use firebrick_core::Run;
use firebrick_models::sampling::{Sampler, Sampling};
use firebrick_models::{GenerateOptions, Model, generate};
use serde_json::Value;

use crate::smollm2::{floats, ids, tensor};

fn setup() -> Option<(Model, Value)> {
    let golden = serde_json::from_str(include_str!("../golden/gemma3.json")).unwrap();
    Some((Model::open(&crate::gemma3()?, &Device::flex()).unwrap(), golden))
}

#[test]
fn equals_transformers() {
    let Some((model, golden)) = setup() else { return };
    let (mut worst_logit, mut worst_nll, mut longest) = (0.0f64, 0.0f64, 0);
    for case in golden["texts"].as_array().unwrap() {
        let tokens = model.tokenizer.encode(case["text"].as_str().unwrap(), true).unwrap();
        assert_eq!(tokens, ids(&case["ids"]));
        longest = longest.max(tokens.len());
        let hidden = model.decoder.hidden(tensor(&tokens), &mut Run::default());
        let last = hidden.narrow(1, tokens.len() - 1, 1);
        let logits = model.decoder.logits(last, &mut Run::default()).into_data();
        let logits: Vec<f32> = logits.try_into_vec_as::<f32>().unwrap();
        let top = ids(&case["last_top10_ids"]);
        for (id, expected) in top.iter().zip(floats(&case["last_top10_logits"])) {
            worst_logit = worst_logit.max((f64::from(logits[*id as usize]) - expected).abs());
        }
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(logits[top[0] as usize], best);
        let nll = model.decoder.nll(tensor(&tokens), &mut Run::default()).mean().into_scalar::<f32>();
        worst_nll = worst_nll.max((f64::from(nll) - case["mean_nll"].as_f64().unwrap()).abs());
    }
    eprintln!("largest difference: logits {worst_logit:.2e}, nll {worst_nll:.2e}");
    assert!(longest > model.decoder.config().window.unwrap(), "one text is longer than the windows");
    assert!(worst_logit < 5e-3, "logits differ by {worst_logit}");
    assert!(worst_nll < 1e-4, "mean nll differs by {worst_nll}");
}

#[test]
fn continues_as_transformers_does() {
    let Some((model, golden)) = setup() else { return };
    for case in golden["prompts"].as_array().unwrap() {
        let prompt = model.tokenizer.encode(case["text"].as_str().unwrap(), true).unwrap();
        assert_eq!(prompt, ids(&case["ids"]));
        let expected = ids(&case["greedy_ids"]);
        let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }).unwrap();
        let options = GenerateOptions {
            max_tokens: expected.len(),
            stop: Vec::new(),
            use_cache: true,
            ..GenerateOptions::default()
        };
        let go = &mut |_| ControlFlow::Continue(());
        let found = generate(&model.decoder, &[], &prompt, &mut sampler, &options, go).unwrap();
        assert_eq!(found, expected);
        assert_eq!(model.tokenizer.decode(&found, false).unwrap(), case["greedy_text"].as_str().unwrap());
    }
}
