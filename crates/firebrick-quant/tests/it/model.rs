use burn::tensor::{Device, Tensor, TensorData};
use firebrick_analysis::{ProfileOptions, profile};
use firebrick_core::{LayerPlan, Part, Run, Silent, Site};
use firebrick_models::{Decoder, ModelFiles, token_tensor};
use firebrick_quant::{
    GptqConfig, Method, Packing, QuantConfig, QuantError, QuantizedMatrix, gguf_blocks, gptq_bit_losses,
    quantize,
};
use firebrick_tensor::block::{DType, decode};
use firebrick_tensor::grid::{Grid, GridKind};
use firebrick_train::{TextData, domain, perplexity};

fn config(method: Method, bits: u8) -> QuantConfig {
    QuantConfig {
        method,
        grid: Grid { bits, group: 64, kind: GridKind::SymHalf, clip: false },
        plan: None,
        true_sequential: false,
        window: 64,
    }
}

/// A domain's training text and held-out text.
fn texts(files: &ModelFiles, name: &str) -> (TextData, TextData) {
    let text = domain(name).unwrap();
    let of = |documents| TextData::from_documents(documents, &files.tokenizer).unwrap();
    (of(text.train_documents()), of(text.held_out_documents()))
}

fn nll(decoder: &Decoder, held: &[u32]) -> f64 {
    perplexity(decoder, &[], held, 0, 64, 8, &Silent).unwrap().mean_nll
}

#[test]
fn gptq_beats_rounding_on_the_embedded_model() {
    let files = ModelFiles::embedded().unwrap();
    let (train, held) = texts(&files, "prose");
    let model = files.load(&Device::flex()).unwrap();
    let run = |method, bits, slice: usize| {
        let text = &train.ids[2048 * slice..2048 * (slice + 1)];
        quantize(model.decoder.clone(), text, &config(method, bits), &Silent).unwrap()
    };
    let gptq = Method::Gptq(GptqConfig { act_order: true, ..Default::default() });
    for slice in 0..3 {
        let held = &held.ids[3000 * slice..3000 * (slice + 1)];
        let base = nll(&model.decoder, held);
        let nearest = nll(&run(Method::Rtn, 3, slice).decoder, held);
        let quantized = run(gptq, 3, slice);
        let found = nll(&quantized.decoder, held);
        assert!(base < found && found < nearest, "base {base}, gptq {found}, nearest {nearest}");
        assert_eq!(quantized.reports.len(), quantized.matrices.len());
        assert!(quantized.reports.iter().all(|r| !r.fallback && r.damp.is_some()));
        let eight = nll(&run(Method::Rtn, 8, slice).decoder, held);
        assert!((eight - base).abs() < 0.01, "8 bits cost nearly nothing: {eight} against {base}");
    }
}

#[test]
fn the_same_codes_on_any_number_of_threads() {
    let files = ModelFiles::embedded().unwrap();
    let (train, _) = texts(&files, "prose");
    let decoder = files.load(&Device::flex()).unwrap().decoder;
    let run = |threads: usize, start: usize, true_sequential: bool| {
        let config = QuantConfig { true_sequential, ..config(Method::Gptq(GptqConfig::default()), 3) };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let text = &train.ids[start..start + 512];
        pool.install(|| quantize(decoder.clone(), text, &config, &Silent)).unwrap().matrices
    };
    for true_sequential in [false, true] {
        let one = run(1, 0, true_sequential);
        assert!(one == run(3, 0, true_sequential));
        assert!(one != run(1, 512, true_sequential), "control: other text gives other codes");
    }
    assert!(run(1, 0, false) != run(1, 0, true), "control: so does calibrating one after the other");
}

#[test]
fn sixteen_bits_everywhere_are_the_base_bit_for_bit() {
    let files = ModelFiles::embedded().unwrap();
    let (train, held) = texts(&files, "prose");
    let decoder = files.load(&Device::flex()).unwrap().decoder;
    let logits = |decoder: &Decoder| {
        let tokens = token_tensor(&[&held.ids[..64]], &decoder.device());
        let logits = decoder.forward(tokens, &mut Run::default()).into_data();
        logits.iter::<f32>().map(f32::to_bits).collect::<Vec<_>>()
    };
    let base = logits(&decoder);
    for method in [Method::Rtn, Method::Gptq(GptqConfig::default())] {
        let with = |bits: u32| {
            let plan = format!("version = 1\n[[rules]]\nselect = \"layers.*\"\nbits = {bits}\n");
            let plan = LayerPlan::from_toml(&plan).unwrap().resolve(decoder.sites()).unwrap();
            let config = QuantConfig { plan: Some(plan), ..config(method, 4) };
            quantize(decoder.clone(), &train.ids[..128], &config, &Silent).unwrap()
        };
        let untouched = with(16);
        assert!(untouched.matrices.is_empty() && untouched.reports.is_empty());
        assert_eq!(logits(&untouched.decoder), base);
        assert_ne!(logits(&with(8).decoder), base, "control: 8 bits are not");
    }
}

#[test]
fn scales_rounded_once_more_cost_little() {
    let files = ModelFiles::embedded().unwrap();
    let (train, held) = texts(&files, "prose");
    let decoder = files.load(&Device::flex()).unwrap().decoder;
    let held = &held.ids[..6000];
    let base = nll(&decoder, held);
    for (bits, kind, dtype) in
        [(2, GridKind::Asym, DType::Q2K), (3, GridKind::SymHalf, DType::Q3K), (4, GridKind::Asym, DType::Q4K)]
    {
        let mut with = config(Method::Gptq(GptqConfig::default()), bits);
        with.grid.kind = kind;
        let exact = quantize(decoder.clone(), &train.ids[..2048], &with, &Silent).unwrap();
        let mut small = exact.decoder.clone();
        for (site, matrix) in &exact.matrices {
            // Four rows of 192 as one of 768: groups of 64 stay what they are, and rows hold whole super-blocks.
            let codes = matrix.codes.len();
            let joined = QuantizedMatrix { d_in: 768, d_out: codes / 768, ..matrix.clone() };
            let blocks = gguf_blocks(&joined, Packing::Small).unwrap();
            assert_eq!((blocks.dtype, blocks.exact), (dtype, false), "{site}");
            let mut values = vec![0.0; codes];
            decode(blocks.dtype, &blocks.bytes, &mut values).unwrap();
            let values = TensorData::new(values, [matrix.d_out, matrix.d_in]);
            small = small.with_weight(*site, Tensor::from_data(values, &Device::flex()));
        }
        let (exact, small) = (nll(&exact.decoder, held), nll(&small, held));
        println!("{bits} bits {kind:?}: {base:.4} nats, {exact:.4} as coded, {small:.4} as {dtype}");
        assert!(small != exact, "control: the rounding is felt");
        assert!(
            (small - exact).abs() < 0.05 * (exact - base) + 0.005,
            "{bits} bits: {base}, {exact}, {small}"
        );
    }
}

#[test]
fn what_cannot_be_quantized_is_listed_before_any_work() {
    let files = ModelFiles::embedded().unwrap();
    let decoder = files.load(&Device::flex()).unwrap().decoder;
    let plan = "version = 1\n[[rules]]\nselect = \"layers.0.attn.*\"\nbits = 12\n[[rules]]\nselect = \"layers.1.mlp.up\"\nbits = 1\n";
    let plan = LayerPlan::from_toml(plan).unwrap().resolve(decoder.sites()).unwrap();
    let damped = Method::Gptq(GptqConfig { damp: -1.0, ..Default::default() });
    let wrong = QuantConfig { plan: Some(plan), window: 1, ..config(damped, 4) };
    let error = quantize(decoder.clone(), &[1, 2, 1_000_000], &wrong, &Silent).unwrap_err();
    let QuantError::Invalid { problems } = &error else { panic!("{error}") };
    assert_eq!(problems.len(), 5, "{problems:?}");
    for part in [
        "window",
        "damp",
        "12 bits at layers.0.attn.q and 3 more",
        "1 bits at layers.1.mlp.up",
        "token 1000000 at position 2",
    ] {
        assert!(error.to_string().contains(part), "{part} in {error}");
    }
    let weight = Site::layer(0, Part::AttnQ);
    let broken = decoder.clone().with_weight(weight, decoder.weight(weight).unwrap() * f32::NAN);
    let error = quantize(broken, &[1, 2], &config(Method::Rtn, 4), &Silent).unwrap_err();
    assert!(error.to_string().contains("layers.0.attn.q"), "{error}");
}

#[test]
fn plans_choose_bits_and_text_is_needed() {
    let files = ModelFiles::embedded().unwrap();
    let sites = files.sites().clone();
    let plan = "version = 1\n[[rules]]\nselect = \"layers.0\"\nbits = 8\n[[rules]]\nselect = \"layers.1\"\nbits = 16\n";
    let plan = LayerPlan::from_toml(plan).unwrap().resolve(&sites).unwrap();
    let decoder = files.load(&Device::flex()).unwrap().decoder;
    let with = QuantConfig { plan: Some(plan), ..config(Method::Rtn, 4) };
    let quantized = quantize(decoder.clone(), &[], &with, &Silent).unwrap();
    for (site, matrix) in &quantized.matrices {
        let expected = if site.layer == Some(0) { 8 } else { 4 };
        assert_eq!(matrix.grid.bits, expected, "{site}");
        assert_ne!(site.layer, Some(1), "16 bits mean untouched");
    }
    let error =
        quantize(decoder, &[1, 2, 3], &config(Method::Gptq(GptqConfig::default()), 4), &Silent).unwrap_err();
    assert!(matches!(error, QuantError::NoCalibration { tokens: 3, window: 64 }), "{error}");
}

#[test]
fn bit_losses_are_those_of_the_quantizer() {
    let files = ModelFiles::embedded().unwrap();
    let (train, _) = texts(&files, "prose");
    let decoder = files.load(&Device::flex()).unwrap().decoder;
    let text = &train.ids[..2048];
    let options = ProfileOptions {
        window: 64,
        bits: vec![2, 3],
        kind: GridKind::SymHalf,
        clip: false,
        ..ProfileOptions::default()
    };
    let before = profile(&decoder, text, &options, &Silent).unwrap();
    let after = gptq_bit_losses(before.clone(), &decoder, text, GptqConfig::default(), &Silent).unwrap();
    assert_eq!((before.quantizer.as_str(), after.quantizer.as_str()), ("rtn", "gptq"));
    let errors = |method| -> Vec<f64> {
        let done = quantize(decoder.clone(), text, &config(method, 3), &Silent).unwrap();
        done.reports.iter().map(|r| r.output_error.unwrap()).collect()
    };
    let (gptq, nearest) = (errors(Method::Gptq(GptqConfig::default())), errors(Method::Rtn));
    let mut later = 0.0f64;
    for (i, (b, a)) in before.linear.iter().zip(&after.linear).enumerate() {
        let ratio = a.bits[1].rise / b.bits[1].rise;
        assert!((a.bits[1].error / b.bits[1].error - ratio).abs() < 1e-9 * ratio);
        assert!(a.bits[0].rise < b.bits[0].rise && ratio < 1.0, "{}: {ratio}", a.site);
        // In the first block, whose inputs no quantized block has touched, a run of the quantizer says the same.
        let off = (gptq[i] / nearest[i] / ratio - 1.0).abs();
        if a.site.layer == Some(0) {
            assert!(off < 1e-6, "{}: {off:e}", a.site);
        } else {
            later = later.max(off);
        }
    }
    assert!(later > 1e-3, "control: later blocks see what the quantized ones before them produce");
    let short = gptq_bit_losses(before, &decoder, &text[..10], GptqConfig::default(), &Silent);
    assert!(matches!(short, Err(QuantError::NoCalibration { .. })));
}
