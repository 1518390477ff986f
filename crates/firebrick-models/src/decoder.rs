//! The wiring of a decoder-only transformer: written once, asking at every site whether a brick sits there.

use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Part, Run, Seed, Site, SiteTable};
use firebrick_tensor::ops::{self, AttentionOptions, KvCache};

use crate::config::DecoderConfig;
use crate::error::ModelError;
use crate::weights::{TensorSource, weight_shape};

/// A decoder-only transformer of the Llama family: grouped-query attention, rotary positions, SwiGLU, RMSNorm.
///
/// With no bricks it is an ordinary burn module. Every site of [`Decoder::sites`] can carry bricks:
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use firebrick_core::{Brick, Part, Run, Selector, Skip};
/// use firebrick_models::Model;
///
/// let model = Model::embedded(&Device::flex())?;
/// let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4]], &Device::flex());
/// let logits = model.decoder.forward(tokens.clone(), &mut Run::default());
/// assert_eq!(logits.dims(), [1, 4, model.decoder.config().vocab]);
///
/// // The same model without its last attention sublayer.
/// let selector: Selector = "layers.-1.attn_sublayer".parse()?;
/// let skip = Skip { sites: selector.resolve(model.decoder.sites())?.of_part(Part::AttnSublayer) };
/// let bricks: [&dyn Brick; 1] = [&skip];
/// let without = model.decoder.forward(tokens, &mut Run::new(&bricks));
/// assert!((logits - without).abs().max().into_scalar::<f32>() > 0.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Module, Debug)]
pub struct Decoder {
    embed: Param<Tensor<2>>,
    layers: Vec<Layer>,
    norm: Param<Tensor<1>>,
    head: Option<Linear>,
    #[module(skip)]
    shape: Shape,
}

#[derive(Clone, Debug)]
struct Shape {
    config: Arc<DecoderConfig>,
    sites: Arc<SiteTable>,
}

impl Shape {
    fn new(config: DecoderConfig) -> Self {
        let sites = config.family().site_table(&config);
        Shape { config: Arc::new(config), sites: Arc::new(sites) }
    }
}

#[derive(Module, Debug)]
struct Layer {
    attn_norm: Param<Tensor<1>>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attn_post_norm: Option<Param<Tensor<1>>>,
    mlp_norm: Param<Tensor<1>>,
    gate: Linear,
    up: Linear,
    down: Linear,
    mlp_post_norm: Option<Param<Tensor<1>>>,
}

/// The flat values of a weight, by site and shape.
type Values<'a> = dyn FnMut(Site, &[usize]) -> Result<Tensor<1>, ModelError> + 'a;

/// Cosines and sines of the rotary positions of one pass, each `[tokens, head_dim / 2]`.
struct Rotary {
    cos: Tensor<2>,
    sin: Tensor<2>,
}

impl Decoder {
    /// Loads the weights of `config` from `source` onto `device`, as constants (see [`Decoder::trainable`]).
    ///
    /// # Errors
    /// If `config` is impossible, or a weight cannot be read. Every missing tensor and every tensor of the wrong shape is
    /// listed, before anything is read.
    pub fn load(
        config: DecoderConfig,
        source: &dyn TensorSource,
        device: &Device,
    ) -> Result<Self, ModelError> {
        possible(&config)?;
        // Sizes that only the configuration claims are not to be allocated.
        let sites = config.family().site_table(&config);
        let weights = sites.entries().iter().filter_map(|e| Some((e.site, weight_shape(&sites, e.site)?)));
        let problems: Vec<String> = weights
            .filter_map(|(site, shape)| source.check_site(site, &shape).err())
            .map(|e| e.to_string())
            .collect();
        if !problems.is_empty() {
            return Err(ModelError::Weights { problems });
        }
        Self::build(config, &mut |site, shape| {
            let values = source.read_site(site, shape)?;
            let n = values.len();
            Ok(Tensor::from_data(TensorData::new(values, [n]), device))
        })
        .map(|d| d.no_grad())
    }

    /// A decoder with random weights: normal with standard deviation 0.02, residual projections scaled by
    /// `1 / sqrt(2 layers)` (GPT-2), norms 1.
    ///
    /// # Errors
    /// If `config` is impossible; every reason is listed.
    pub fn random(config: DecoderConfig, seed: Seed, device: &Device) -> Result<Self, ModelError> {
        possible(&config)?;
        let depth = (2.0 * config.layers as f64).sqrt();
        Self::build(config, &mut |site, shape| {
            let n: usize = shape.iter().product();
            let values: Vec<f32> = match (shape.len(), site.part) {
                (1, _) => vec![1.0; n],
                (_, part) => {
                    let residual = matches!(part, Part::AttnO | Part::MlpDown);
                    let std = if residual { 0.02 / depth } else { 0.02 };
                    seed.normal(&format!("decoder.init/{site}"), n, std)
                }
            };
            Ok(Tensor::from_data(TensorData::new(values, [n]), device))
        })
        .map(|d| d.no_grad())
    }

    /// Builds the modules; `weight` gives the flat values of a site in Hugging Face's layout (`[d_out, d_in]`).
    fn build(config: DecoderConfig, weight: &mut Values<'_>) -> Result<Self, ModelError> {
        let shape = Shape::new(config);
        let (c, sites) = (shape.config.clone(), shape.sites.clone());
        let mut matrix = |site: Site, rows: usize, cols: usize| {
            Ok::<_, ModelError>(weight(site, &[rows, cols])?.reshape([rows, cols]))
        };
        let embed = Param::from_tensor(matrix(Site::global(Part::Embed), c.vocab, c.d_model)?);
        let mut linear = |site: Site| {
            let (d_in, d_out) = sites.linear(site).expect("the family's table has this linear layer");
            let weight = Param::from_tensor(matrix(site, d_out, d_in)?.transpose());
            Ok::<_, ModelError>(Linear { weight, bias: None })
        };
        let head = (!c.tied_head).then(|| linear(Site::global(Part::Head))).transpose()?;
        let mut linears = Vec::with_capacity(c.layers);
        for l in 0..c.layers {
            let mut at = |part| linear(Site::layer(l, part));
            let (q, k, v, o) = (at(Part::AttnQ)?, at(Part::AttnK)?, at(Part::AttnV)?, at(Part::AttnO)?);
            linears.push((q, k, v, o, at(Part::MlpGate)?, at(Part::MlpUp)?, at(Part::MlpDown)?));
        }
        let mut norm = |site: Site| Ok::<_, ModelError>(Param::from_tensor(weight(site, &[c.d_model])?));
        let post = c.norm_placement.has_post_norm();
        let mut layers = Vec::with_capacity(c.layers);
        for (l, (q, k, v, o, gate, up, down)) in linears.into_iter().enumerate() {
            layers.push(Layer {
                attn_norm: norm(Site::layer(l, Part::AttnNorm))?,
                q,
                k,
                v,
                o,
                attn_post_norm: post.then(|| norm(Site::layer(l, Part::AttnPostNorm))).transpose()?,
                mlp_norm: norm(Site::layer(l, Part::MlpNorm))?,
                gate,
                up,
                down,
                mlp_post_norm: post.then(|| norm(Site::layer(l, Part::MlpPostNorm))).transpose()?,
            });
        }
        Ok(Decoder { embed, layers, norm: norm(Site::global(Part::Norm))?, head, shape })
    }

    /// The same decoder with all weights trainable (for full fine-tuning), on a device that records gradients.
    pub fn trainable(self) -> Self {
        self.set_require_grad(true)
    }

    /// The shape of the model.
    pub fn config(&self) -> &DecoderConfig {
        &self.shape.config
    }

    /// The sites of the model.
    pub fn sites(&self) -> &SiteTable {
        &self.shape.sites
    }

    /// The device the weights are on.
    pub fn device(&self) -> Device {
        self.norm.val().device()
    }

    /// The weight of the head `[d_model, vocab]`; the transposed embedding when tied.
    pub fn head_weight(&self) -> Tensor<2> {
        match &self.head {
            Some(head) => head.weight.val(),
            None => self.embed.val().transpose(),
        }
    }

    /// The weight at `site` in Hugging Face's layout: `[d_out, d_in]` for linear layers, `[vocab, d_model]` for the
    /// embedding, `[1, d]` for norms; `None` where the site has no weight of its own.
    pub fn weight(&self, site: Site) -> Option<Tensor<2>> {
        let row = |p: &Param<Tensor<1>>| p.val().unsqueeze_dim(0);
        let linear = |l: &Linear| l.weight.val().transpose();
        match site.part {
            Part::Embed => return Some(self.embed.val()),
            Part::Norm => return Some(row(&self.norm)),
            Part::Head => return self.head.as_ref().map(linear),
            _ => {}
        }
        let layer = self.layers.get(site.layer?)?;
        match site.part {
            Part::AttnNorm => Some(row(&layer.attn_norm)),
            Part::AttnPostNorm => layer.attn_post_norm.as_ref().map(row),
            Part::MlpNorm => Some(row(&layer.mlp_norm)),
            Part::MlpPostNorm => layer.mlp_post_norm.as_ref().map(row),
            _ => layer.linear(site.part).map(linear),
        }
    }

    /// The same decoder with the weight of the linear layer at `site` replaced by `weight: [d_out, d_in]`, a constant.
    ///
    /// # Panics
    /// If `site` is not a linear layer inside a block.
    pub fn with_weight(mut self, site: Site, weight: Tensor<2>) -> Self {
        let layer = site.layer.and_then(|l| self.layers.get_mut(l));
        let linear = layer.and_then(|l| l.linear_mut(site.part));
        let linear = linear.unwrap_or_else(|| panic!("{site} is not a linear layer inside a block"));
        linear.weight = Param::from_tensor(weight.transpose()).set_require_grad(false);
        self
    }

    /// The same decoder with only these layers, in this order; a layer may appear more than once, and its repeats are
    /// parameters of their own.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn with_layers(mut self, layers: &[usize]) -> Self {
        let config = DecoderConfig { layers: layers.len(), ..self.config().clone() };
        let copy = |(i, l): (usize, &usize)| {
            let layer = self.layers[*l].clone();
            // Gradients are filed under ids: with one id the repeats would share them.
            if layers[..i].contains(l) { layer.map(&mut FreshIds) } else { layer }
        };
        self.layers = layers.iter().enumerate().map(copy).collect();
        self.shape = Shape::new(config);
        self
    }

    /// Logits `[batch, tokens, vocab]` of `tokens: [batch, tokens]`.
    pub fn forward(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        let hidden = self.hidden(tokens, run);
        self.logits(hidden, run)
    }

    /// The residual stream after the last norm, `[batch, tokens, d_model]`. With a [`KvCache`] in `run` the tokens come
    /// after those it holds.
    pub fn hidden(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        let length = tokens.dims()[1];
        // A layer that a brick skips holds nothing: the fullest one knows the position.
        let held = |cache: &KvCache| (0..self.layers.len()).map(|l| cache.len(l)).max();
        let start = run.get::<KvCache>().and_then(held).unwrap_or(0);
        let rotary = self.rotary(start, length);
        let mut x = self.embed(tokens, run);
        for layer in 0..self.layers.len() {
            x = self.block_at(layer, x, &rotary, run);
        }
        self.norm_at(Site::global(Part::Norm), &self.norm, x, run)
    }

    /// The embedded tokens `[batch, tokens, d_model]` of `tokens: [batch, tokens]`.
    pub fn embed(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        let [batch, length] = tokens.dims();
        run.tokens = Some(tokens.clone());
        let rows = self.embed.val().select(0, tokens.reshape([batch * length]));
        let d = self.config().d_model;
        run.at(Site::global(Part::Embed), rows.reshape([batch, length, d]), &mut |x, _| x)
    }

    /// Runs block `layer` alone on the residual stream `x: [batch, tokens, d_model]` of texts that begin at position 0.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn block(&self, layer: usize, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let rotary = self.rotary(0, x.dims()[1]);
        self.block_at(layer, x, &rotary, run)
    }

    fn block_at(&self, l: usize, x: Tensor<3>, rotary: &Rotary, run: &mut Run<'_>) -> Tensor<3> {
        run.at(Site::layer(l, Part::Block), x, &mut |x, run: &mut Run<'_>| {
            self.sublayers(l, &self.layers[l], x, rotary, run)
        })
    }

    /// The head: logits `[batch, tokens, vocab]` of `hidden: [batch, tokens, d_model]`.
    pub fn logits(&self, hidden: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        run.at(Site::global(Part::Head), hidden, &mut |x, _| {
            let [b, t, d] = x.dims();
            let logits = x.reshape([b * t, d]).matmul(self.head_weight());
            let vocab = logits.dims()[1];
            logits.reshape([b, t, vocab])
        })
    }

    /// Negative log-likelihood in nats of each next token of `tokens: [batch, tokens]`, `[batch, tokens - 1]`, without
    /// materialising the logits where the head is bare.
    ///
    /// # Panics
    /// If there are no tokens.
    pub fn nll(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<2> {
        let [batch, length] = tokens.dims();
        let hidden = self.hidden(tokens.clone(), run);
        let d = hidden.dims()[2];
        let hidden = hidden.narrow(1, 0, length - 1);
        let targets = tokens.narrow(1, 1, length - 1).reshape([batch * (length - 1)]);
        let nll = if run.is_bare(Site::global(Part::Head)) {
            ops::linear_cross_entropy(hidden.reshape([batch * (length - 1), d]), self.head_weight(), targets)
        } else {
            let logits = self.logits(hidden, run);
            let vocab = logits.dims()[2];
            ops::cross_entropy(logits.reshape([batch * (length - 1), vocab]), targets)
        };
        nll.reshape([batch, length - 1])
    }

    /// An empty key-value cache for `batch` sequences of up to `capacity` tokens; put it into a [`Run`] to decode step by
    /// step.
    pub fn kv_cache(&self, batch: usize, capacity: usize) -> KvCache {
        let c = self.config();
        KvCache::new(c.layers, batch, c.kv_heads, capacity, c.head_dim, &self.device())
    }

    fn rotary(&self, start: usize, length: usize) -> Rotary {
        let c = self.config();
        let half = c.head_dim / 2;
        let angle = |i: usize| {
            let (position, j) = ((start + i / half) as f64, (i % half) as f64);
            position * c.rope_theta.powf(-2.0 * j / c.head_dim as f64)
        };
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..length * half).map(|i| f(angle(i)) as f32).collect();
            Tensor::<2>::from_data(TensorData::new(values, [length, half]), &self.device())
        };
        Rotary { cos: table(f64::cos), sin: table(f64::sin) }
    }

    fn norm_at(&self, site: Site, gamma: &Param<Tensor<1>>, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let eps = self.config().norm_eps;
        run.at(site, x, &mut |x, _| ops::rms_norm(x, gamma.val(), eps))
    }

    fn sublayers(
        &self,
        l: usize,
        layer: &Layer,
        x: Tensor<3>,
        rotary: &Rotary,
        run: &mut Run<'_>,
    ) -> Tensor<3> {
        let site = |part| Site::layer(l, part);
        let x = run.at(site(Part::AttnSublayer), x, &mut |x, run: &mut Run<'_>| {
            let normed = self.norm_at(site(Part::AttnNorm), &layer.attn_norm, x.clone(), run);
            let mut branch = run.at(site(Part::Attn), normed, &mut |x, run: &mut Run<'_>| {
                self.attention(l, layer, x, rotary, run)
            });
            if let Some(norm) = &layer.attn_post_norm {
                branch = self.norm_at(site(Part::AttnPostNorm), norm, branch, run);
            }
            x + branch
        });
        run.at(site(Part::MlpSublayer), x, &mut |x, run: &mut Run<'_>| {
            let normed = self.norm_at(site(Part::MlpNorm), &layer.mlp_norm, x.clone(), run);
            let mut branch = run.at(site(Part::Mlp), normed, &mut |x, run: &mut Run<'_>| {
                let gate = run.at(site(Part::MlpGate), x.clone(), &mut |x, _| layer.gate.forward(x));
                let up = run.at(site(Part::MlpUp), x, &mut |x, _| layer.up.forward(x));
                let inner = ops::swiglu(gate, up);
                run.at(site(Part::MlpDown), inner, &mut |x, _| layer.down.forward(x))
            });
            if let Some(norm) = &layer.mlp_post_norm {
                branch = self.norm_at(site(Part::MlpPostNorm), norm, branch, run);
            }
            x + branch
        })
    }

    fn attention(
        &self,
        l: usize,
        layer: &Layer,
        x: Tensor<3>,
        rotary: &Rotary,
        run: &mut Run<'_>,
    ) -> Tensor<3> {
        let c = self.config();
        let site = |part| Site::layer(l, part);
        let [batch, length, _] = x.dims();
        let heads = |t: Tensor<3>, n: usize| t.reshape([batch, length, n, c.head_dim]).swap_dims(1, 2);
        let q = run.at(site(Part::AttnQ), x.clone(), &mut |x, _| layer.q.forward(x));
        let k = run.at(site(Part::AttnK), x.clone(), &mut |x, _| layer.k.forward(x));
        let v = run.at(site(Part::AttnV), x, &mut |x, _| layer.v.forward(x));
        let q = ops::rope(heads(q, c.heads), rotary.cos.clone(), rotary.sin.clone());
        let mut k = ops::rope(heads(k, c.kv_heads), rotary.cos.clone(), rotary.sin.clone());
        let mut v = heads(v, c.kv_heads);
        if let Some(cache) = run.get_mut::<KvCache>() {
            (k, v) = cache.append(l, k, v);
        }
        let scale = (c.head_dim as f64).powf(-0.5);
        let options = AttentionOptions { scale, causal: true, window: None, softcap: None };
        let mixed = ops::attention(q, k, v, options);
        let mixed = mixed.swap_dims(1, 2).reshape([batch, length, c.heads * c.head_dim]);
        run.at(site(Part::AttnO), mixed, &mut |x, _| layer.o.forward(x))
    }
}

/// Fails with every reason why there is no such decoder.
fn possible(config: &DecoderConfig) -> Result<(), ModelError> {
    match config.problems() {
        problems if problems.is_empty() => Ok(()),
        problems => Err(ModelError::Invalid { path: "config.json".into(), problems }),
    }
}

/// Gives every parameter an id of its own.
struct FreshIds;

impl ModuleMapper for FreshIds {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (_, value, mapper) = param.consume();
        Param::from_mapped_value(ParamId::new(), value, mapper)
    }
}

impl Layer {
    fn linear(&self, part: Part) -> Option<&Linear> {
        match part {
            Part::AttnQ => Some(&self.q),
            Part::AttnK => Some(&self.k),
            Part::AttnV => Some(&self.v),
            Part::AttnO => Some(&self.o),
            Part::MlpGate => Some(&self.gate),
            Part::MlpUp => Some(&self.up),
            Part::MlpDown => Some(&self.down),
            _ => None,
        }
    }

    fn linear_mut(&mut self, part: Part) -> Option<&mut Linear> {
        match part {
            Part::AttnQ => Some(&mut self.q),
            Part::AttnK => Some(&mut self.k),
            Part::AttnV => Some(&mut self.v),
            Part::AttnO => Some(&mut self.o),
            Part::MlpGate => Some(&mut self.gate),
            Part::MlpUp => Some(&mut self.up),
            Part::MlpDown => Some(&mut self.down),
            _ => None,
        }
    }
}
