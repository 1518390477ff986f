use burn::tensor::Device;
use firebrick_core::{LayerPlan, Silent};
use firebrick_models::ModelFiles;
use firebrick_quant::{GptqConfig, Method, QuantConfig, QuantError, quantize};
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

#[test]
fn gptq_beats_rounding_on_the_embedded_model() {
    let files = ModelFiles::embedded().unwrap();
    let text = domain("prose").unwrap();
    let train = TextData::from_documents(text.train_documents(), &files.tokenizer).unwrap();
    let held = TextData::from_documents(text.held_out_documents(), &files.tokenizer).unwrap();
    let model = files.load(&Device::flex()).unwrap();
    let nll = |d: &firebrick_models::Decoder| {
        perplexity(d, &[], &held.ids[..4096], 0, 64, 8, &Silent).unwrap().mean_nll
    };
    let run = |method, bits| {
        let quantized =
            quantize(model.decoder.clone(), &train.ids[..2048], &config(method, bits), &Silent).unwrap();
        (nll(&quantized.decoder), quantized)
    };
    let base = nll(&model.decoder);
    let (nearest, _) = run(Method::Rtn, 3);
    let (gptq, quantized) = run(Method::Gptq(GptqConfig { act_order: true, ..Default::default() }), 3);
    assert!(base < gptq && gptq < nearest, "base {base}, gptq {gptq}, nearest {nearest}");
    assert_eq!(quantized.reports.len(), quantized.matrices.len());
    let (eight, _) = run(Method::Rtn, 8);
    assert!((eight - base).abs() < 0.01, "8 bits cost nearly nothing: {eight} against {base}");
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
