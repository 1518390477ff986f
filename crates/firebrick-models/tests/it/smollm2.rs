//! SmolLM2-135M against transformers: `tests/golden/smollm2.json`, made by `tests/golden/smollm2.py`.

use std::ops::ControlFlow;

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Part, Run, Tap, Taps};
use firebrick_models::chat::{ChatOptions, ChatTemplate, Message};
use firebrick_models::sampling::{Sampler, Sampling};
use firebrick_models::{GenerateOptions, Model, generate};
use serde_json::Value;

fn model() -> Option<Model> {
    Some(Model::open(&crate::smollm2()?, &Device::flex()).unwrap())
}

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/smollm2.json")).unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

pub fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

pub fn tensor(ids: &[u32]) -> Tensor<2, Int> {
    let n = ids.len();
    let ids: Vec<i32> = ids.iter().map(|i| *i as i32).collect();
    Tensor::from_data(TensorData::new(ids, [1, n]), &Device::flex())
}

fn rms(t: Tensor<3>) -> f64 {
    f64::from(t.powi_scalar(2).mean().sqrt().into_scalar::<f32>())
}

#[test]
fn equals_transformers() {
    let Some(model) = model() else { return };
    let golden = golden();
    let decoder = &model.decoder;
    let tap = Tap { sites: decoder.sites().all().of_part(Part::Block) };
    let (mut worst_logit, mut worst_nll, mut worst_rms) = (0.0f64, 0.0f64, 0.0f64);
    for case in golden["texts"].as_array().unwrap() {
        let tokens = model.tokenizer.encode(case["text"].as_str().unwrap(), false).unwrap();
        assert_eq!(tokens, ids(&case["ids"]));
        let bricks: [&dyn Brick; 1] = [&tap];
        let mut run = Run::new(&bricks);
        let hidden = decoder.hidden(tensor(&tokens), &mut run);
        let taps = run.take::<Taps>().unwrap().seen;
        let mut found = vec![rms(taps[0].1.clone())];
        found.extend(taps[..taps.len() - 1].iter().map(|(_, _, y)| rms(y.clone())));
        found.push(rms(hidden.clone()));
        let expected = floats(&case["hidden_rms"]);
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(&expected) {
            worst_rms = worst_rms.max((a / b - 1.0).abs());
        }
        let last = hidden.narrow(1, tokens.len() - 1, 1);
        let logits: Vec<f32> =
            decoder.logits(last, &mut Run::default()).into_data().try_into_vec_as::<f32>().unwrap();
        let top = ids(&case["last_top10_ids"]);
        for (id, expected) in top.iter().zip(floats(&case["last_top10_logits"])) {
            worst_logit = worst_logit.max((f64::from(logits[*id as usize]) - expected).abs());
        }
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(logits[top[0] as usize], best);
        let nll = f64::from(decoder.nll(tensor(&tokens), &mut Run::default()).mean().into_scalar::<f32>());
        worst_nll = worst_nll.max((nll - case["mean_nll"].as_f64().unwrap()).abs());
    }
    eprintln!(
        "largest difference: logits {worst_logit:.2e}, nll {worst_nll:.2e}, rms {worst_rms:.2e} relative"
    );
    assert!(worst_logit < 5e-3, "logits differ by {worst_logit}");
    assert!(worst_nll < 1e-4, "mean nll differs by {worst_nll}");
    assert!(worst_rms < 1e-3, "rms differs by {worst_rms} relative");
}

#[test]
fn answers_as_transformers_does() {
    let Some(model) = model() else { return };
    let template = ChatTemplate::of(&model.tokenizer).unwrap();
    for chat in golden()["chats"].as_array().unwrap() {
        let messages = [Message::user(chat["user"].as_str().unwrap())];
        let prompt = template.render(&messages, &ChatOptions::answer()).unwrap();
        assert_eq!(prompt, chat["prompt"].as_str().unwrap());
        let prompt = model.tokenizer.encode(&prompt, false).unwrap();
        assert_eq!(prompt, ids(&chat["ids"]));
        let expected = ids(&chat["greedy_ids"]);
        for use_cache in [true, false] {
            let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }).unwrap();
            // Without the cache every token costs a whole pass.
            let max_tokens = if use_cache { expected.len() } else { expected.len().min(8) };
            let options = GenerateOptions { max_tokens, use_cache, ..GenerateOptions::default() };
            let go = &mut |_| ControlFlow::Continue(());
            let found = generate(&model.decoder, &[], &prompt, &mut sampler, &options, go).unwrap();
            assert_eq!(found, expected[..max_tokens], "cache: {use_cache}");
            if use_cache {
                let text = model.tokenizer.decode(&found, false).unwrap();
                assert_eq!(text, chat["greedy_text"].as_str().unwrap());
            }
        }
    }
}
