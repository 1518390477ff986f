use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Brick, Run, Seed, Silent, Site, SiteKind};
use firebrick_models::{Biases, Decoder, DecoderConfig};
use firebrick_peft::LoraConfig;
use firebrick_quant::{GptqConfig, Method, PackedLinear, QuantConfig, quantize, rtn};
use firebrick_tensor::grid::{Grid, GridKind};

fn decoder(device: &Device) -> Decoder {
    let config = DecoderConfig { d_model: 32, d_ff: 48, head_dim: 8, ..DecoderConfig::tiny(40) };
    let decoder = Decoder::random(config, Seed(5), device).unwrap();
    // Large enough for their codes to matter.
    decoder.sites().block_linears().iter().fold(decoder, |decoder, site| {
        let weight = decoder.weight(site).unwrap() * 10.0;
        decoder.with_weight(site, weight)
    })
}

fn logits(decoder: &Decoder, bricks: &[&dyn Brick]) -> Tensor<3> {
    let ids = Tensor::from_data(TensorData::new((0..10).collect::<Vec<i32>>(), [1, 10]), &decoder.device());
    decoder.forward(ids, &mut Run::new(bricks))
}

fn largest(a: Tensor<3>, b: Tensor<3>) -> f32 {
    (a - b).abs().max().into_scalar()
}

/// Every linear layer on `grid`: the packed brick, and the decoder with what its codes stand for.
fn both(decoder: &Decoder, grid: Grid) -> (PackedLinear, Decoder) {
    let device = decoder.device();
    let mut dense = decoder.clone();
    let mut matrices = Vec::new();
    for site in decoder.sites().block_linears().iter() {
        let weight = decoder.weight(site).unwrap();
        let [d_out, d_in] = weight.dims();
        let values = weight.into_data().try_into_vec_as::<f32>().unwrap();
        let matrix = rtn(&values, d_in, grid).unwrap();
        let back = TensorData::new(matrix.dequantize(), [d_out, d_in]);
        dense = dense.with_weight(site, Tensor::from_data(back, &device));
        matrices.push((site, matrix));
    }
    let packed = PackedLinear::new(matrices.iter().map(|(s, m)| (*s, m)), &device).unwrap();
    (packed, dense)
}

#[test]
fn packed_equals_dequantized() {
    let decoder = decoder(&Device::flex());
    let base = logits(&decoder, &[]);
    for bits in 2..=8 {
        for kind in [GridKind::SymHalf, GridKind::Asym] {
            let (packed, dense) = both(&decoder, Grid { bits, group: 16, kind, clip: false });
            let found = largest(logits(&decoder, &[&packed]), logits(&dense, &[]));
            let lossy = largest(logits(&dense, &[]), base.clone());
            println!("{bits} bits {kind:?}: packed {found:e}, against the weights themselves {lossy:e}");
            assert!(found < 2e-6, "{bits} bits {kind:?}: {found}");
            assert!(lossy > 2e-5, "control: {bits} bits {kind:?} lose something: {lossy}");
        }
    }
    let bytes =
        |bits| both(&decoder, Grid { bits, group: 16, kind: GridKind::SymHalf, clip: false }).0.bytes();
    assert!(bytes(2) < bytes(4) && bytes(4) < bytes(8));
}

#[test]
fn biases_and_norms_on_heads_stay_beside_packed_weights() {
    let device = Device::flex();
    let config = DecoderConfig {
        model_type: "qwen3".into(),
        biases: Biases { qkv: true, o: true, mlp: false },
        qk_norm: true,
        d_model: 32,
        d_ff: 48,
        head_dim: 8,
        ..DecoderConfig::tiny(40)
    };
    let decoder = Decoder::random(config, Seed(5), &device).unwrap();
    let with_vectors = |size: f64| {
        let entries = decoder.sites().entries().iter();
        let vectors = entries.filter(|e| matches!(e.kind, SiteKind::Bias { .. } | SiteKind::Norm { .. }));
        vectors.filter(|e| e.site.layer.is_some()).fold(decoder.clone(), |decoder, entry| {
            let weight = decoder.weight(entry.site).unwrap();
            let [_, d] = weight.dims();
            let draw = TensorData::new(Seed(7).normal(&entry.site.to_string(), d, size), [1, d]);
            decoder.with_weight(entry.site, weight + Tensor::from_data(draw, &device))
        })
    };
    let (plain, full) = (with_vectors(0.0), with_vectors(0.3));
    let grid = Grid { bits: 4, group: 16, kind: GridKind::SymHalf, clip: false };
    let (packed, dense) = both(&full, grid);
    assert!(largest(logits(&full, &[&packed]), logits(&dense, &[])) < 2e-6);
    assert!(largest(logits(&plain, &[&packed]), logits(&dense, &[])) > 1e-2, "control: they do something");

    // Calibrated block by block through them.
    let text: Vec<u32> = (0..256).map(|i| (i * 7 + i / 11) % 40).collect();
    let config = QuantConfig {
        method: Method::Gptq(GptqConfig::default()),
        grid,
        plan: None,
        true_sequential: true,
        window: 32,
    };
    let found = quantize(full.clone(), &text, &config, &Silent).unwrap();
    assert_eq!(found.matrices.len(), decoder.sites().block_linears().len());
    let (gptq, rtn) = (
        largest(logits(&found.decoder, &[]), logits(&full, &[])),
        largest(logits(&dense, &[]), logits(&full, &[])),
    );
    println!("logits move by {gptq:e} with GPTQ, {rtn:e} with rounding");
    assert!(gptq > 0.0 && gptq < 2.0 * rtn, "{gptq} against {rtn}");
}

#[test]
fn adapters_train_above_packed_weights() {
    // QLoRA, by construction.
    let device = Device::flex().autodiff();
    let decoder = decoder(&device);
    let (packed, dense) = both(&decoder, Grid { bits: 4, group: 16, kind: GridKind::SymHalf, clip: false });
    let bank = LoraConfig::default()
        .init(decoder.sites(), &decoder.sites().block_linears(), Seed(2), &device)
        .unwrap();
    let gradient = |decoder: &Decoder, bricks: &[&dyn Brick]| {
        let ids = TensorData::new((0..10).collect::<Vec<i32>>(), [1, 10]);
        let loss = decoder.nll(Tensor::from_data(ids, &device), &mut Run::new(bricks)).mean();
        let gradients = loss.backward();
        let site: Site = "layers.0.attn.q".parse().unwrap();
        bank.get(site).unwrap().1.b.val().grad(&gradients).unwrap()
    };
    let above_packed = gradient(&decoder, &[&packed, &bank]);
    let above_dense = gradient(&dense, &[&bank]);
    let above_base = gradient(&decoder, &[&bank]);
    let size = |t: Tensor<2>| t.abs().max().into_scalar::<f32>();
    let difference = size(above_packed.clone() - above_dense.clone()) / size(above_dense);
    assert!(difference < 1e-4, "{difference}");
    let other = size(above_packed.clone() - above_base) / size(above_packed);
    assert!(other > 1e-2, "control: the weights themselves give another gradient: {other}");
    assert_eq!(packed.num_params(), 0, "packed weights are constants");
}
