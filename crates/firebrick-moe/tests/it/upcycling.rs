use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Brick, Mode, Run, Seed};
use firebrick_models::{Biases, Decoder, DecoderConfig};
use firebrick_moe::{ExpertLoads, MoeError, MoeLayer, UpcycleConfig, upcycle};
use firebrick_train::AdamW;

fn decoder() -> Decoder {
    Decoder::random(DecoderConfig::tiny(32), Seed(1), &Device::flex()).unwrap()
}

fn tokens() -> Tensor<2, Int> {
    let ids: Vec<i32> = (0..36).map(|i| (i * 11 + i / 5) % 32).collect();
    Tensor::from_data(TensorData::new(ids, [3, 12]), &Device::flex())
}

/// The decoder's feed-forward networks are small at random: scaled up so that they matter.
fn heavy() -> Decoder {
    let mut decoder = decoder();
    let sites = decoder.sites().block_linears();
    for site in sites.iter() {
        let weight = decoder.weight(site).unwrap();
        decoder = decoder.with_weight(site, weight * 10.0);
    }
    decoder
}

fn gap(decoder: &Decoder, moe: &MoeLayer) -> f32 {
    let bricks: [&dyn Brick; 1] = [moe];
    let sparse = decoder.forward(tokens(), &mut Run::new(&bricks));
    (decoder.forward(tokens(), &mut Run::default()) - sparse).abs().max().into_scalar()
}

#[test]
fn an_upcycled_decoder_computes_what_it_computed() {
    let decoder = heavy();
    let make = |top_k, config: UpcycleConfig| {
        upcycle(&decoder, &[0, 1], 4, top_k, &config, Seed(2), &Device::flex()).unwrap()
    };
    for top_k in [2, 3, 4] {
        assert!(gap(&decoder, &make(top_k, UpcycleConfig::default())) < 1e-5);
    }
    let plain = UpcycleConfig { renormalise: false, ..UpcycleConfig::default() };
    assert!(gap(&decoder, &make(2, plain)) > 1e-3, "weights that do not sum to 1 change the function");
    let noisy = UpcycleConfig { noise: 0.1, ..UpcycleConfig::default() };
    assert!(gap(&decoder, &make(2, noisy)) > 1e-3);
}

#[test]
fn networks_that_experts_can_not_be_are_refused() {
    let biases = Biases { mlp: true, ..Biases::default() };
    let config = DecoderConfig { biases, ..DecoderConfig::tiny(32) };
    let decoder = Decoder::random(config, Seed(1), &Device::flex()).unwrap();
    let config = UpcycleConfig::default();
    let error = upcycle(&decoder, &[0], 4, 2, &config, Seed(2), &Device::flex()).unwrap_err();
    assert!(error.to_string().contains("biases"), "{error}");
}

#[test]
fn noise_has_the_size_asked_for_and_differs_from_expert_to_expert() {
    let decoder = decoder();
    let make = |noise| {
        let config = UpcycleConfig { noise, ..UpcycleConfig::default() };
        upcycle(&decoder, &[1], 3, 2, &config, Seed(2), &Device::flex()).unwrap()
    };
    let gate = |moe: &MoeLayer| moe.parts().next().unwrap().2.gate.val();
    let (clean, noisy) = (gate(&make(0.0)), gate(&make(0.05)));
    let size = |t: Tensor<3>| t.square().mean().sqrt().into_scalar::<f32>();
    let ratio = size(noisy.clone() - clean.clone()) / size(clean);
    assert!((ratio - 0.05).abs() < 0.005, "{ratio}");
    let apart = noisy.clone().narrow(0, 0, 1) - noisy.narrow(0, 1, 1);
    assert!(size(apart) > 0.0);
}

#[test]
fn an_upcycled_decoder_trains() {
    let (decoder, device) = (heavy(), Device::flex().autodiff());
    let config = UpcycleConfig { noise: 0.02, jitter: 0.01, ..UpcycleConfig::default() };
    let mut moe = upcycle(&decoder, &[0, 1], 4, 2, &config, Seed(2), &device).unwrap();
    let mut optimizer = AdamW::default();
    let mut losses = Vec::new();
    for step in 0..30 {
        let bricks: [&dyn Brick; 1] = [&moe];
        let mut run = Run::new(&bricks);
        (run.mode, run.seed) = (Mode::Train, Seed(step));
        let nll = decoder.nll(tokens(), &mut run).mean();
        losses.push(nll.clone().without_autodiff().into_scalar::<f32>());
        assert_eq!(run.losses().len(), 2);
        let balance = run.total_loss().unwrap();
        let value = balance.clone().without_autodiff().into_scalar::<f32>();
        assert!((0.0099..0.04).contains(&value), "{value}");
        let loads = run.take::<ExpertLoads>().unwrap();
        assert!(loads.counts.values().all(|counts| counts.iter().sum::<u64>() == 3 * 12 * 2));
        let gradients = GradientsParams::from_grads((nll + balance).backward(), &moe);
        moe = optimizer.step(1e-2, moe, gradients);
    }
    assert!(losses[29] < losses[0] - 0.3, "{losses:?}");
}

#[test]
fn what_cannot_be_upcycled_is_refused() {
    let decoder = decoder();
    let make = |layers: &[usize], top_k, config| {
        upcycle(&decoder, layers, 4, top_k, &config, Seed(2), &Device::flex()).unwrap_err()
    };
    let config = UpcycleConfig::default;
    let missing = make(&[0, 2, 5], 2, config());
    assert!(
        matches!(&missing, MoeError::NoSuchLayer { missing, layers: 2 } if missing == &[2, 5]),
        "{missing}"
    );
    assert!(matches!(make(&[0], 1, config()), MoeError::NoRouterGradient));
    assert!(matches!(make(&[0, 0], 2, config()), MoeError::Shapes { .. }));
    assert!(matches!(make(&[0], 5, config()), MoeError::Settings { .. }));
    assert!(matches!(make(&[0], 2, UpcycleConfig { noise: -1.0, ..config() }), MoeError::Settings { .. }));
}
