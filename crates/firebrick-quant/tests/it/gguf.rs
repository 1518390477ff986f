//! Weights of GGUF files, computed with as they are.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use firebrick_core::{Brick, Part, Run, Seed, Silent, Site};
use firebrick_models::{Decoder, Export, ExportType, ModelFiles, token_tensor};
use firebrick_peft::LoraConfig;
use firebrick_quant::PackedLinear;
use firebrick_tensor::ops::{PackedInputs, PackedMatrix, Precision};
use firebrick_tensor::stream::Executor;
use firebrick_train::perplexity;

const TEXT: &str = "In the beginning there was a small house at the edge of the forest. The people who lived in it went out \
every morning to gather wood, and came back in the evening with what the forest had given them. One day the youngest of \
them found a stone that was warm to the touch, and carried it home. Nobody knew where it had come from, and nobody could \
say why the snow around the house began to melt in the middle of winter.";

/// The embedded model in a file of this type.
fn files(dtype: &str) -> ModelFiles {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let embedded = ModelFiles::embedded().unwrap();
    Export::files(&embedded, dtype.parse::<ExportType>().unwrap())
        .write(&path, &Executor::default())
        .unwrap();
    ModelFiles::open(&path).unwrap()
}

/// The model decoded to f32, and the same with its weights left packed.
fn both(dtype: &str) -> (Decoder, Decoder, BTreeMap<Site, PackedMatrix>) {
    let device = Device::flex();
    let dense = files(dtype).load(&device).unwrap().decoder;
    let (model, packed) = files(dtype).load_packed(Precision::F32, &device).unwrap();
    (dense, model.decoder, packed)
}

fn logits(decoder: &Decoder, bricks: &[&dyn Brick], tokens: usize) -> Tensor<3> {
    let ids: Vec<u32> = (0..tokens).map(|i| (i * 7919 % decoder.config().vocab) as u32).collect();
    decoder.forward(token_tensor(&[&ids], &decoder.device()), &mut Run::new(bricks))
}

/// The largest difference, relative to the largest value.
fn off(got: Tensor<3>, want: Tensor<3>) -> f32 {
    let largest = want.clone().abs().max().into_scalar::<f32>();
    (got - want).abs().max().into_scalar::<f32>() / largest
}

#[test]
fn packed_files_compute_what_decoded_ones_do() {
    for dtype in ["q4_0", "q4_1", "q8_0"] {
        let (dense, late, packed) = both(dtype);
        let sites = dense.sites();
        assert_eq!(packed.len(), sites.block_linears().len() + 1, "{dtype}: every linear layer and the head");
        let brick = PackedLinear::from_packed(packed);
        let rounded = brick.clone().with_inputs(PackedInputs::EightBits);
        // One row, few rows, and many.
        for tokens in [1, 5, 40] {
            let want = logits(&dense, &[], tokens);
            let e = off(logits(&late, &[&brick], tokens), want.clone());
            assert!(e < 1e-5, "{dtype}, {tokens} tokens: {e:e}");
            let e = off(logits(&late, &[&rounded], tokens), want);
            assert!((1e-4..0.05).contains(&e), "{dtype}, {tokens} tokens: inputs of 8 bits cost {e:e}");
        }
        let dense_bytes: usize =
            sites.entries().iter().filter_map(|e| sites.linear(e.site)).map(|(i, o)| 4 * i * o).sum();
        let share = brick.bytes() as f64 / dense_bytes as f64;
        let (least, most) = if dtype == "q8_0" { (0.26, 0.28) } else { (0.14, 0.19) };
        assert!((least..most).contains(&share), "{dtype}: {share} of the bytes of f32");
        // Without the brick, weights are decoded when they are read.
        let q = Site::layer(1, Part::AttnQ);
        let (a, b) = (late.weight(q).unwrap(), dense.weight(q).unwrap());
        assert!((a - b).abs().max().into_scalar::<f32>() < 1e-6);
        let e = off(logits(&late, &[], 5), logits(&dense, &[], 5));
        assert!(e < 1e-5, "{dtype}: {e:e}");
    }
}

#[test]
fn the_order_of_rows_matters() {
    // Control of the one above: heads turned for rotary pairs side by side are another model.
    let (dense, late, mut packed) = both("q8_0");
    let (q, rows) = (Site::layer(0, Part::AttnQ), files("q8_0"));
    let name = rows.config.family().gguf_name(q).unwrap();
    let (d_in, d_out) = rows.sites().linear(q).unwrap();
    let bytes = rows.checkpoint.bytes(&name).unwrap();
    let dtype = rows.checkpoint.get(&name).unwrap().dtype;
    let as_stored = PackedMatrix::from_blocks(dtype, bytes, [d_in, d_out], |r| r, &Device::flex());
    packed.insert(q, as_stored.unwrap().unwrap());
    let brick = PackedLinear::from_packed(packed);
    assert!(off(logits(&late, &[&brick], 12), logits(&dense, &[], 12)) > 1e-3);
}

#[test]
fn other_types_are_decoded_and_adapters_sit_above() {
    let (dense, late, packed) = both("f16");
    assert!(packed.is_empty());
    assert_eq!(off(logits(&late, &[], 5), logits(&dense, &[], 5)), 0.0);

    let (dense, late, packed) = both("q4_0");
    let mut bank = LoraConfig::default()
        .init(dense.sites(), &dense.sites().block_linears(), Seed(2), &Device::flex())
        .unwrap();
    bank = burn::module::Module::map(bank, &mut Shift);
    let brick = PackedLinear::from_packed(packed);
    let (above, want) = (logits(&late, &[&brick, &bank], 6), logits(&dense, &[&bank], 6));
    assert!(off(above, want.clone()) < 1e-5);
    assert!(off(logits(&late, &[&brick], 6), want) > 1e-3, "control: the adapters do something");
}

/// Adapters begin with nothing to add.
struct Shift;

impl burn::module::ModuleMapper for Shift {
    fn map_float<const D: usize>(
        &mut self,
        param: burn::module::Param<Tensor<D>>,
    ) -> burn::module::Param<Tensor<D>> {
        param.map(|t| t + 0.02)
    }
}

#[test]
fn inputs_of_eight_bits_cost_little_perplexity() {
    let embedded = ModelFiles::embedded().unwrap();
    let ids = embedded.tokenizer.encode(TEXT, false).unwrap();
    for dtype in ["q4_0", "q8_0"] {
        let (dense, late, packed) = both(dtype);
        let of = |decoder: &Decoder, bricks: &[&dyn Brick]| {
            perplexity(decoder, bricks, &ids, TEXT.len(), 64, 1, &Silent).unwrap().perplexity
        };
        let want = of(&dense, &[]);
        let exact = PackedLinear::from_packed(packed);
        let same = of(&late, &[&exact]) / want - 1.0;
        let lost = of(&late, &[&exact.with_inputs(PackedInputs::EightBits)]) / want - 1.0;
        println!("{dtype}: perplexity {want}, exact {same:e}, inputs of 8 bits {lost:e}");
        assert!(same.abs() < 1e-5, "{dtype}: {same:e}");
        assert!(lost.abs() < 0.01 && lost != same, "{dtype}: {lost:e}");
    }
}
