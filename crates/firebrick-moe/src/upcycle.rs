//! Sparse up-cycling (arXiv 2212.05055): a dense decoder's feed-forward networks become mixtures of experts.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use firebrick_core::{Part, Seed, Site};
use firebrick_models::{Activation, Decoder, constant_on};
use firebrick_train::ordered_sum;
use serde::{Deserialize, Serialize};

use crate::{ExpertBank, MoeError, MoeLayer, RouterConfig, TopKRouter};

/// How experts and routers start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpcycleConfig {
    /// Standard deviation of the noise on every expert's weights, as a fraction of the root mean square of the
    /// dense weight; it breaks the symmetry of the copies. 0 keeps the model's function.
    pub noise: f64,
    /// Standard deviation of the routers' initial weights.
    pub router_std: f64,
    /// Whether the weights of a token's experts sum to 1; without it the model's function is not kept.
    pub renormalise: bool,
    /// In training a router's input is multiplied by draws from `1 - jitter..1 + jitter`.
    pub jitter: f64,
}

impl Default for UpcycleConfig {
    /// No noise, routers of standard deviation 0.02, renormalized, no jitter.
    fn default() -> Self {
        UpcycleConfig { noise: 0.0, router_std: 0.02, renormalise: true, jitter: 0.0 }
    }
}

/// Mixtures of `experts` copies of the feed-forward network of each of `layers`, of which every token uses `top_k`.
///
/// Without noise the decoder computes with this brick what it computed without. The brick is on `device`; the decoder
/// is left alone.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use firebrick_core::{Brick, Run, Seed};
/// use firebrick_models::{Decoder, DecoderConfig};
/// use firebrick_moe::{UpcycleConfig, upcycle};
///
/// let device = Device::flex();
/// let decoder = Decoder::random(DecoderConfig::tiny(32), Seed(0), &device)?;
/// let moe = upcycle(&decoder, &[1], 4, 2, &UpcycleConfig::default(), Seed(1), &device)?;
/// let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4]], &device);
/// let dense = decoder.forward(tokens.clone(), &mut Run::default());
/// let bricks: [&dyn Brick; 1] = [&moe];
/// let sparse = decoder.forward(tokens, &mut Run::new(&bricks));
/// assert!((dense - sparse).abs().max().into_scalar::<f32>() < 1e-5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If the decoder lacks a layer, a layer comes twice, its feed-forward networks are no SwiGLU without biases, or a setting
/// cannot be meant; see [`RouterConfig::check`].
pub fn upcycle(
    decoder: &Decoder,
    layers: &[usize],
    experts: usize,
    top_k: usize,
    config: &UpcycleConfig,
    seed: Seed,
    device: &Device,
) -> Result<MoeLayer, MoeError> {
    let router = RouterConfig {
        jitter: config.jitter,
        init_std: config.router_std,
        ..RouterConfig::new(experts, top_k, config.renormalise)
    };
    router.check()?;
    if !(config.noise.is_finite() && config.noise >= 0.0) {
        return Err(MoeError::Settings { problems: vec![format!("`noise` is {}", config.noise)] });
    }
    let has = decoder.config().layers;
    let missing: Vec<usize> = layers.iter().copied().filter(|&l| l >= has).collect();
    if !missing.is_empty() {
        return Err(MoeError::NoSuchLayer { missing, layers: has });
    }
    let dense = decoder.config();
    if dense.activation != Activation::Silu || dense.biases.mlp {
        let what = "experts have no biases and their gates pass through SiLU, unlike this model's feed-forward network";
        return Err(MoeError::Settings { problems: vec![what.into()] });
    }
    let d_model = dense.d_model;
    let copies = |layer: usize, part: Part| {
        let dense = decoder.weight(Site::layer(layer, part)).expect("a decoder's layer has this weight");
        let dense = dense.without_autodiff().to_device(&device.clone().inner()).transpose();
        let mut stack = dense.clone().unsqueeze_dim::<3>(0).repeat_dim(0, experts);
        if config.noise > 0.0 {
            let [d_in, d_out] = dense.dims();
            let draw = |e| {
                let site = Site::expert(layer, part, e);
                seed.normal(&format!("moe.upcycle/{site}"), d_in * d_out, config.noise)
            };
            let noise: Vec<f32> = (0..experts).flat_map(draw).collect();
            let noise = TensorData::new(noise, [experts, d_in, d_out]);
            let noise = Tensor::<3>::from_data(noise, &stack.device());
            let size = (ordered_sum(dense.square()) / (d_in * d_out) as f64).sqrt().reshape([1, 1, 1]);
            stack = stack + noise * size;
        }
        Param::from_tensor(constant_on(stack, device))
    };
    let part = |&layer: &usize| {
        let router = TopKRouter::new(d_model, router.clone(), Site::layer(layer, Part::Mlp), seed, device)?;
        let [gate, up, down] = [Part::MlpGate, Part::MlpUp, Part::MlpDown].map(|p| copies(layer, p));
        Ok((layer, router, ExpertBank { gate, up, down }))
    };
    MoeLayer::from_parts(layers.iter().map(part).collect::<Result<_, MoeError>>()?)
}
