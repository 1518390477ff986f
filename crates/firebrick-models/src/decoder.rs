//! The wiring of a decoder-only transformer: written once, asking at every site whether a brick sits there.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_core::{LowRank, Part, Run, Seed, Site, SiteKind, SiteTable};
use firebrick_tensor::ops::{self, AttentionOptions, KvCache, PackedMatrix, Precision, Segments};

use crate::attention_taps::AttentionTaps;
use crate::config::{Activation, DecoderConfig};
use crate::error::ModelError;
use crate::rotary::{RopeScaling, Rotary};
use crate::weights::{CheckpointWeights, TensorSource, weight_shape};

mod one_token;

/// A decoder-only transformer: grouped-query attention, rotary positions, a gated feed-forward network, RMSNorm; what the
/// families differ in are settings of [`DecoderConfig`].
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
    precision: Precision,
}

impl Shape {
    fn new(config: DecoderConfig) -> Self {
        let sites = config.family().site_table(&config);
        Shape { config: Arc::new(config), sites: Arc::new(sites), precision: Precision::F32 }
    }
}

#[derive(Module, Debug)]
struct Layer {
    attn_norm: Param<Tensor<1>>,
    q: Linear,
    k: Linear,
    v: Linear,
    q_norm: Option<Param<Tensor<1>>>,
    k_norm: Option<Param<Tensor<1>>>,
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

/// Makes parameters of what `values` gives, site by site.
struct Builder<'a> {
    sites: &'a SiteTable,
    /// Weights that are decoded when they are asked for, and not before.
    packed: &'a BTreeMap<Site, PackedMatrix>,
    values: &'a mut Values<'a>,
}

impl Builder<'_> {
    /// `[rows, cols]`.
    fn matrix(&mut self, site: Site, rows: usize, cols: usize) -> Result<Tensor<2>, ModelError> {
        Ok((self.values)(site, &[rows, cols])?.reshape([rows, cols]))
    }

    /// The norm or bias at `site`, if the model has one there.
    fn vector(&mut self, site: Site) -> Result<Option<Param<Tensor<1>>>, ModelError> {
        match self.sites.get(site).map(|e| e.kind) {
            Some(SiteKind::Norm { d } | SiteKind::Bias { d }) => {
                Ok(Some(Param::from_tensor((self.values)(site, &[d])?)))
            }
            _ => Ok(None),
        }
    }

    fn norm(&mut self, site: Site) -> Result<Param<Tensor<1>>, ModelError> {
        Ok(self.vector(site)?.expect("every family has this norm"))
    }

    /// The linear layer at `site`, with its bias.
    fn linear(&mut self, site: Site) -> Result<Linear, ModelError> {
        let (d_in, d_out) = self.sites.linear(site).expect("every family has this linear layer");
        let weight = match self.packed.get(&site) {
            Some(packed) => decoded_late(packed.clone()),
            None => Param::from_tensor(self.matrix(site, d_out, d_in)?.transpose()),
        };
        let bias = match site.part.bias() {
            Some(part) => self.vector(Site { part, ..site })?,
            None => None,
        };
        Ok(Linear { weight, bias })
    }
}

/// The parameter whose value is `packed` decoded, once something reads it.
fn decoded_late(packed: PackedMatrix) -> Param<Tensor<2>> {
    let (device, shape) = (packed.words.device(), [packed.d_in, packed.d_out]);
    let decode = move |device: &Device, _| packed.unpack().to_device(device);
    Param::uninitialized(ParamId::new(), decode, device, false, shape.into())
}

/// Rotary positions of one pass, by layer: those of one row, or with [`Segments`] in the run those of all rows.
struct Rotations {
    global: Rotary,
    /// In layers with a window, where it is another one.
    local: Option<Rotary>,
}

impl Rotations {
    /// Those of a layer with a window, or without one.
    fn of(&self, windowed: bool) -> &Rotary {
        self.local.as_ref().filter(|_| windowed).unwrap_or(&self.global)
    }
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
        check(&config, source)?;
        Self::read(config, source, &BTreeMap::new(), &|_| false, device)
    }

    /// [`Decoder::load`] for a model on the CPU whose weights are not trained: its matrices are rounded to bf16 and stored so, in half the
    /// memory, and its products are those of bf16 numbers ([`Precision::Bf16`]).
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn load_in_bf16(
        config: DecoderConfig,
        source: &dyn TensorSource,
        device: &Device,
    ) -> Result<Self, ModelError> {
        check(&config, source)?;
        let decoder = Self::read(config, source, &BTreeMap::new(), &|_| true, device)?;
        Ok(decoder.with_precision(Precision::Bf16))
    }

    /// [`Decoder::load`], with the weights of linear layers left packed where the checkpoint has them in blocks that
    /// [`PackedMatrix::from_blocks`] takes: those of the head too. A brick that computes with them belongs at their sites; without one
    /// the weight of a site is decoded when it is first read, and kept.
    ///
    /// On the CPU matrices that the checkpoint has in bf16 stay in bf16: the same numbers, in half the memory that a token reads. With
    /// [`Precision::Bf16`] the others are rounded to it, as [`Decoder::load_in_bf16`] does.
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn load_packed(
        config: DecoderConfig,
        source: &CheckpointWeights<'_>,
        precision: Precision,
        device: &Device,
    ) -> Result<(Self, BTreeMap<Site, PackedMatrix>), ModelError> {
        check(&config, source)?;
        let mut packed = BTreeMap::new();
        for entry in source.sites.entries() {
            if let Some(matrix) = source.packed(entry.site, device)? {
                packed.insert(entry.site, matrix);
            }
        }
        let rounds = precision == Precision::Bf16;
        let half = |site| *device == Device::flex() && (rounds || source.is_bf16(site));
        let decoder = Self::read(config, source, &packed, &half, device)?;
        Ok((decoder.with_precision(precision), packed))
    }

    /// Reads all but the `packed` weights; matrices at sites that are `half` stay in bf16.
    fn read(
        config: DecoderConfig,
        source: &dyn TensorSource,
        packed: &BTreeMap<Site, PackedMatrix>,
        half: &dyn Fn(Site) -> bool,
        device: &Device,
    ) -> Result<Self, ModelError> {
        Self::build(config, packed, &mut |site, shape| {
            let values = source.read_site(site, shape)?;
            let n = values.len();
            let values = Tensor::<1>::from_data(TensorData::new(values, [n]), device);
            Ok(if shape.len() == 2 && half(site) { values.cast(DType::BF16) } else { values })
        })
        .map(|d| d.no_grad())
    }

    /// A decoder with random weights: normal with standard deviation 0.02, residual projections scaled by
    /// `1 / sqrt(2 layers)` (GPT-2); norms multiply by 1, biases are 0.
    ///
    /// # Errors
    /// If `config` is impossible; every reason is listed.
    pub fn random(config: DecoderConfig, seed: Seed, device: &Device) -> Result<Self, ModelError> {
        possible(&config)?;
        let depth = (2.0 * config.layers as f64).sqrt();
        let sites = config.family().site_table(&config);
        let gain = if config.norm_plus_one { 0.0 } else { 1.0 };
        Self::build(config, &BTreeMap::new(), &mut |site, shape| {
            let n: usize = shape.iter().product();
            let values: Vec<f32> = match sites.get(site).map(|e| e.kind) {
                Some(SiteKind::Norm { .. }) => vec![gain; n],
                Some(SiteKind::Bias { .. }) => vec![0.0; n],
                _ => {
                    let residual = matches!(site.part, Part::AttnO | Part::MlpDown);
                    let std = if residual { 0.02 / depth } else { 0.02 };
                    seed.normal(&format!("decoder.init/{site}"), n, std)
                }
            };
            Ok(Tensor::from_data(TensorData::new(values, [n]), device))
        })
        .map(|d| d.no_grad())
    }

    /// Builds the modules; `weight` gives the flat values of a site in Hugging Face's layout (`[d_out, d_in]`).
    fn build(
        config: DecoderConfig,
        packed: &BTreeMap<Site, PackedMatrix>,
        weight: &mut Values<'_>,
    ) -> Result<Self, ModelError> {
        let shape = Shape::new(config);
        let c = shape.config.clone();
        let mut of = Builder { sites: &shape.sites, packed, values: weight };
        let embed = Param::from_tensor(of.matrix(Site::global(Part::Embed), c.vocab, c.d_model)?);
        let head = (!c.tied_head).then(|| of.linear(Site::global(Part::Head))).transpose()?;
        let mut layers = Vec::with_capacity(c.layers);
        for l in 0..c.layers {
            let site = |part| Site::layer(l, part);
            layers.push(Layer {
                attn_norm: of.norm(site(Part::AttnNorm))?,
                q: of.linear(site(Part::AttnQ))?,
                k: of.linear(site(Part::AttnK))?,
                v: of.linear(site(Part::AttnV))?,
                q_norm: of.vector(site(Part::AttnQNorm))?,
                k_norm: of.vector(site(Part::AttnKNorm))?,
                o: of.linear(site(Part::AttnO))?,
                attn_post_norm: of.vector(site(Part::AttnPostNorm))?,
                mlp_norm: of.norm(site(Part::MlpNorm))?,
                gate: of.linear(site(Part::MlpGate))?,
                up: of.linear(site(Part::MlpUp))?,
                down: of.linear(site(Part::MlpDown))?,
                mlp_post_norm: of.vector(site(Part::MlpPostNorm))?,
            });
        }
        let norm = of.norm(Site::global(Part::Norm))?;
        Ok(Decoder { embed, layers, norm, head, shape })
    }

    /// The same decoder with all weights trainable (for full fine-tuning), on a device that records gradients.
    pub fn trainable(self) -> Self {
        self.set_require_grad(true)
    }

    /// The same decoder with the products of its linear layers and its head computed like this. Weights stay what they are.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.shape.precision = precision;
        self
    }

    /// How the products of linear layers and of the head are computed; f32 unless set otherwise.
    pub fn precision(&self) -> Precision {
        self.shape.precision
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

    /// The weight of the head `[d_model, vocab]`, in the type that it is stored in; the transposed embedding when tied. Logits may be
    /// capped beside (`final_softcap` of [`DecoderConfig`]).
    pub fn head_weight(&self) -> Tensor<2> {
        match &self.head {
            Some(head) => head.weight.val(),
            None => self.embed.val().transpose(),
        }
    }

    /// The weight at `site` in Hugging Face's layout, f32: `[d_out, d_in]` for linear layers, `[vocab, d_model]` for the
    /// embedding, `[1, d]` for norms and biases; `None` where the site has no weight of its own.
    pub fn weight(&self, site: Site) -> Option<Tensor<2>> {
        let stored = self.stored_weight(site)?;
        Some(if stored.dtype() == DType::BF16 { stored.cast(DType::F32) } else { stored })
    }

    /// [`Decoder::weight`] in the type that it is stored in.
    fn stored_weight(&self, site: Site) -> Option<Tensor<2>> {
        let row = |p: &Param<Tensor<1>>| p.val().unsqueeze_dim(0);
        let linear = |l: &Linear| l.weight.val().transpose();
        match site.part {
            Part::Embed => return Some(self.embed.val()),
            Part::Norm => return Some(row(&self.norm)),
            Part::Head => return self.head.as_ref().map(linear),
            _ => {}
        }
        let layer = self.layers.get(site.layer?)?;
        layer.linear(site.part).map(linear).or_else(|| layer.vector(site.part).map(row))
    }

    /// The path of the parameter at `site` in this module, such as `layers.0.q.weight`, by which optimizers know it; `None`
    /// where the site has no weight of its own.
    pub fn parameter(&self, site: Site) -> Option<String> {
        self.weight(site)?;
        let name = match site.part {
            Part::Embed => return Some("embed".into()),
            Part::Norm => return Some("norm".into()),
            Part::Head => return Some("head.weight".into()),
            Part::AttnNorm => "attn_norm",
            Part::AttnPostNorm => "attn_post_norm",
            Part::MlpNorm => "mlp_norm",
            Part::MlpPostNorm => "mlp_post_norm",
            Part::AttnQNorm => "q_norm",
            Part::AttnKNorm => "k_norm",
            Part::AttnQ => "q.weight",
            Part::AttnK => "k.weight",
            Part::AttnV => "v.weight",
            Part::AttnO => "o.weight",
            Part::MlpGate => "gate.weight",
            Part::MlpUp => "up.weight",
            Part::MlpDown => "down.weight",
            Part::AttnQBias => "q.bias",
            Part::AttnKBias => "k.bias",
            Part::AttnVBias => "v.bias",
            Part::AttnOBias => "o.bias",
            Part::MlpGateBias => "gate.bias",
            Part::MlpUpBias => "up.bias",
            Part::MlpDownBias => "down.bias",
            _ => return None,
        };
        Some(format!("layers.{}.{name}", site.layer?))
    }

    /// The same decoder with the weight at `site` replaced by `weight`, a constant: `[d_out, d_in]` for linear layers (the head
    /// too, if it has a weight of its own), `[1, d]` for norms and biases.
    ///
    /// # Panics
    /// If neither such a head nor anything inside a block has its weight at `site`.
    pub fn with_weight(mut self, site: Site, weight: Tensor<2>) -> Self {
        if let (Part::Head, Some(head)) = (site.part, self.head.as_mut()) {
            head.weight = Param::from_tensor(weight.transpose()).set_require_grad(false);
            return self;
        }
        let nothing = || -> ! { panic!("no weight inside a block at {site}") };
        let Some(layer) = site.layer.and_then(|l| self.layers.get_mut(l)) else { nothing() };
        if let Some(linear) = layer.linear_mut(site.part) {
            linear.weight = Param::from_tensor(weight.transpose()).set_require_grad(false);
        } else if let Some(vector) = layer.vector_mut(site.part) {
            *vector = Param::from_tensor(weight.squeeze_dim(0)).set_require_grad(false);
        } else {
            nothing()
        }
        self
    }

    /// The same decoder with only these layers, in this order; a layer may appear more than once, and its repeats are
    /// parameters of their own.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn with_layers(mut self, layers: &[usize]) -> Self {
        let config = self.config().with_layers(layers);
        let copy = |(i, l): (usize, &usize)| {
            let layer = self.layers[*l].clone();
            // Gradients are filed under ids: with one id the repeats would share them.
            if layers[..i].contains(l) { layer.map(&mut FreshIds) } else { layer }
        };
        self.layers = layers.iter().enumerate().map(copy).collect();
        self.shape = Shape { precision: self.shape.precision, ..Shape::new(config) };
        self
    }

    /// Logits `[batch, tokens, vocab]` of `tokens: [batch, tokens]`.
    pub fn forward(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        ops::awake(&tokens.device(), || {
            let hidden = self.hidden(tokens, run);
            self.logits(hidden, run)
        })
    }

    /// The residual stream after the last norm, `[batch, tokens, d_model]`. With a [`KvCache`] in `run` the tokens come
    /// after those it holds. With [`Segments`] each document of a row is computed as if it had a row of its own.
    ///
    /// # Panics
    /// If the run has a cache and segments, or segments of another shape than `tokens`.
    pub fn hidden(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        ops::awake(&tokens.device(), || self.residual_stream(tokens, run))
    }

    fn residual_stream(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        let length = tokens.dims()[1];
        // A layer that a brick skips holds nothing: the fullest one knows the position.
        let held = |cache: &KvCache| (0..self.layers.len()).map(|l| cache.len(l)).max();
        let start = run.get::<KvCache>().and_then(held).unwrap_or(0);
        let rotary = self.rotations(start, length, run);
        let mut x = self.embed(tokens, run);
        for layer in 0..self.layers.len() {
            x = self.block_at(layer, x, &rotary, run);
        }
        self.final_norm(x, run)
    }

    /// The embedded tokens `[batch, tokens, d_model]` of `tokens: [batch, tokens]`.
    pub fn embed(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        let [batch, length] = tokens.dims();
        run.tokens = Some(tokens.clone());
        let mut rows = ops::embedding(self.embed.val(), tokens.reshape([batch * length]));
        let d = self.config().d_model;
        if self.config().scaled_embedding {
            rows = rows * (d as f64).sqrt();
        }
        run.at(Site::global(Part::Embed), rows.reshape([batch, length, d]), &mut |x, _| x)
    }

    /// Runs block `layer` alone on the residual stream `x: [batch, tokens, d_model]` of texts that begin at position 0.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn block(&self, layer: usize, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let rotary = self.rotations(0, x.dims()[1], run);
        self.block_at(layer, x, &rotary, run)
    }

    fn block_at(&self, l: usize, x: Tensor<3>, rotary: &Rotations, run: &mut Run<'_>) -> Tensor<3> {
        if let Some(y) = self.one_token(l, &x, rotary, run) {
            return y;
        }
        run.at(Site::layer(l, Part::Block), x, &mut |x, run: &mut Run<'_>| {
            self.sublayers(l, &self.layers[l], x, rotary, run)
        })
    }

    /// The norm in front of the head, of a residual stream `x: [batch, tokens, d_model]` of any layer.
    pub fn final_norm(&self, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        self.norm_at(Site::global(Part::Norm), &self.norm, x, run)
    }

    /// The head: logits `[batch, tokens, vocab]` of `hidden: [batch, tokens, d_model]`.
    pub fn logits(&self, hidden: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let logits = run.at(Site::global(Part::Head), hidden, &mut |x, _| {
            ops::linear(x, self.head_weight(), self.precision())
        });
        match self.config().final_softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// Negative log-likelihood in nats of each next token of `tokens: [batch, tokens]`, `[batch, tokens - 1]`.
    ///
    /// # Panics
    /// If there are no tokens.
    pub fn nll(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<2> {
        let hidden = self.hidden(tokens.clone(), run);
        self.nll_of(hidden, tokens, run)
    }

    /// [`Decoder::nll`] from the residual stream after the last block, `x: [batch, tokens, d_model]`.
    ///
    /// # Panics
    /// If there are no tokens.
    pub fn nll_after(&self, x: Tensor<3>, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<2> {
        let hidden = self.final_norm(x, run);
        self.nll_of(hidden, tokens, run)
    }

    fn nll_of(&self, hidden: Tensor<3>, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<2> {
        let [batch, length] = tokens.dims();
        let hidden = hidden.narrow(1, 0, length - 1);
        let targets = tokens.narrow(1, 1, length - 1).reshape([batch * (length - 1)]);
        self.cross_entropy(hidden, targets, run).reshape([batch, length - 1])
    }

    /// Negative log-likelihood in nats `[batch * tokens]` of `targets: [batch * tokens]` behind
    /// `hidden: [batch, tokens, d_model]`, without materialising the logits where the head is bare and nothing caps them.
    pub fn cross_entropy(&self, hidden: Tensor<3>, targets: Tensor<1, Int>, run: &mut Run<'_>) -> Tensor<1> {
        let rows = targets.dims()[0];
        if run.is_bare(Site::global(Part::Head)) && self.config().final_softcap.is_none() {
            let d = hidden.dims()[2];
            return ops::linear_cross_entropy(
                hidden.reshape([rows, d]),
                self.head_weight(),
                targets,
                self.precision(),
            );
        }
        let logits = self.logits(hidden, run);
        let vocab = logits.dims()[2];
        ops::cross_entropy(logits.reshape([rows, vocab]), targets)
    }

    /// An empty key-value cache for `batch` sequences of up to `capacity` tokens; put it into a [`Run`] to decode step by
    /// step.
    pub fn kv_cache(&self, batch: usize, capacity: usize) -> KvCache {
        let c = self.config();
        KvCache::new(c.layers, batch, c.kv_heads, capacity, c.head_dim, &self.device())
    }

    fn rotations(&self, start: usize, length: usize, run: &Run<'_>) -> Rotations {
        let c = self.config();
        let positions: Vec<usize> = match run.get::<Segments>() {
            Some(segments) => segments.positions().collect(),
            None => (start..start + length).collect(),
        };
        let of = |theta, scaling| Rotary::new(theta, scaling, c.head_dim, &positions, &self.device());
        Rotations {
            global: of(c.rope_theta, c.rope_scaling),
            local: c.local_theta.map(|theta| of(theta, RopeScaling::None)),
        }
    }

    fn attention_options(&self, l: usize) -> AttentionOptions {
        let c = self.config();
        AttentionOptions {
            scale: c.attention_scale(),
            causal: true,
            window: c.window.filter(|_| c.is_windowed(l)),
            softcap: c.attn_softcap,
        }
    }

    /// What a norm multiplies by.
    fn gain(&self, weight: &Param<Tensor<1>>) -> Tensor<1> {
        if self.config().norm_plus_one { weight.val() + 1.0 } else { weight.val() }
    }

    fn norm_at(&self, site: Site, weight: &Param<Tensor<1>>, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let eps = self.config().norm_eps;
        run.at(site, x, &mut |x, _| ops::rms_norm(x, self.gain(weight), eps))
    }

    /// The linear layer at `site` and the bias behind it.
    fn linear_at(&self, site: Site, linear: &Linear, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let weight = || linear.weight.val();
        let y = match run.low_rank(site) {
            Some(LowRank { a, b, scale }) => ops::lora_linear(x, weight(), a, b, scale, self.precision()),
            None => run.at(site, x, &mut |x, _| ops::linear(x, weight(), self.precision())),
        };
        match (&linear.bias, site.part.bias()) {
            (Some(bias), Some(part)) => {
                run.at(Site { part, ..site }, y, &mut |y, _| y + bias.val().unsqueeze::<3>())
            }
            _ => y,
        }
    }

    /// The norm over each head of `x: [batch, tokens, heads * head_dim]`, if there is one.
    fn head_norm_at(
        &self,
        site: Site,
        weight: &Option<Param<Tensor<1>>>,
        x: Tensor<3>,
        run: &mut Run<'_>,
    ) -> Tensor<3> {
        let Some(weight) = weight else { return x };
        let (eps, head_dim) = (self.config().norm_eps, self.config().head_dim);
        run.at(site, x, &mut |x, _| {
            let [batch, tokens, width] = x.dims();
            let heads = x.reshape([batch, tokens, width / head_dim, head_dim]);
            ops::rms_norm(heads, self.gain(weight), eps).reshape([batch, tokens, width])
        })
    }

    fn sublayers(
        &self,
        l: usize,
        layer: &Layer,
        x: Tensor<3>,
        rotary: &Rotations,
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
                let gate = self.linear_at(site(Part::MlpGate), &layer.gate, x.clone(), run);
                let up = self.linear_at(site(Part::MlpUp), &layer.up, x, run);
                let inner = match self.config().activation {
                    Activation::Silu => ops::swiglu(gate, up),
                    Activation::GeluTanh => gelu_tanh(gate) * up,
                };
                self.linear_at(site(Part::MlpDown), &layer.down, inner, run)
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
        rotary: &Rotations,
        run: &mut Run<'_>,
    ) -> Tensor<3> {
        let c = self.config();
        let site = |part| Site::layer(l, part);
        let [batch, length, _] = x.dims();
        let heads = |t: Tensor<3>, n: usize| t.reshape([batch, length, n, c.head_dim]).swap_dims(1, 2);
        let q = self.linear_at(site(Part::AttnQ), &layer.q, x.clone(), run);
        let k = self.linear_at(site(Part::AttnK), &layer.k, x.clone(), run);
        let v = self.linear_at(site(Part::AttnV), &layer.v, x, run);
        let q = self.head_norm_at(site(Part::AttnQNorm), &layer.q_norm, q, run);
        let k = self.head_norm_at(site(Part::AttnKNorm), &layer.k_norm, k, run);
        let rotary = rotary.of(c.is_windowed(l));
        let segments = run.get::<Segments>().cloned();
        let turned = |t: Tensor<3>, n: usize| {
            let (cos, sin) = (rotary.cos.clone(), rotary.sin.clone());
            if segments.is_none() {
                return ops::rope(heads(t, n), cos, sin);
            }
            // All rows as one: each token has a position of its own.
            let row = t.reshape([1, batch * length, n, c.head_dim]).swap_dims(1, 2);
            let turned = ops::rope(row, cos, sin).swap_dims(1, 2);
            turned.reshape([batch, length, n, c.head_dim]).swap_dims(1, 2)
        };
        let q = turned(q, c.heads);
        let mut k = turned(k, c.kv_heads);
        let mut v = heads(v, c.kv_heads);
        if let Some(cache) = run.get_mut::<KvCache>() {
            assert!(segments.is_none(), "rows of several documents have no key-value cache");
            (k, v) = cache.append(l, k, v);
        }
        let options = self.attention_options(l);
        if let Some(taps) = run.get_mut::<AttentionTaps>() {
            taps.seen.push((site(Part::Attn), q.clone(), k.clone(), options.clone()));
        }
        let mixed = match segments {
            Some(segments) => ops::segmented_attention(q, k, v, segments, options),
            None => ops::attention(q, k, v, options),
        };
        let mixed = mixed.swap_dims(1, 2).reshape([batch, length, c.heads * c.head_dim]);
        self.linear_at(site(Part::AttnO), &layer.o, mixed, run)
    }
}

/// Fails with every reason why there is no such decoder, or why `source` does not have its weights.
fn check(config: &DecoderConfig, source: &dyn TensorSource) -> Result<(), ModelError> {
    possible(config)?;
    // Sizes that only the configuration claims are not to be allocated.
    let sites = config.family().site_table(config);
    let weights = sites.entries().iter().filter_map(|e| Some((e.site, weight_shape(&sites, e.site)?)));
    let problems: Vec<String> = weights
        .filter_map(|(site, shape)| source.check_site(site, &shape).err())
        .map(|e| e.to_string())
        .collect();
    if problems.is_empty() { Ok(()) } else { Err(ModelError::Weights { problems }) }
}

/// Fails with every reason why there is no such decoder.
fn possible(config: &DecoderConfig) -> Result<(), ModelError> {
    match config.problems() {
        problems if problems.is_empty() => Ok(()),
        problems => Err(ModelError::Invalid { path: "config.json".into(), problems }),
    }
}

/// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`; burn's own raises to a real power, which is slow.
fn gelu_tanh(x: Tensor<3>) -> Tensor<3> {
    const SLOPE: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
    let cube = x.clone() * x.clone() * x.clone();
    let inner = (x.clone() + cube * 0.044715) * SLOPE;
    x * (inner.tanh() + 1.0) * 0.5
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

    /// The norm or bias at `part`.
    fn vector(&self, part: Part) -> Option<&Param<Tensor<1>>> {
        match part {
            Part::AttnNorm => Some(&self.attn_norm),
            Part::AttnQNorm => self.q_norm.as_ref(),
            Part::AttnKNorm => self.k_norm.as_ref(),
            Part::AttnPostNorm => self.attn_post_norm.as_ref(),
            Part::MlpNorm => Some(&self.mlp_norm),
            Part::MlpPostNorm => self.mlp_post_norm.as_ref(),
            _ => self.linear(biased(part)?)?.bias.as_ref(),
        }
    }

    fn vector_mut(&mut self, part: Part) -> Option<&mut Param<Tensor<1>>> {
        match part {
            Part::AttnNorm => Some(&mut self.attn_norm),
            Part::AttnQNorm => self.q_norm.as_mut(),
            Part::AttnKNorm => self.k_norm.as_mut(),
            Part::AttnPostNorm => self.attn_post_norm.as_mut(),
            Part::MlpNorm => Some(&mut self.mlp_norm),
            Part::MlpPostNorm => self.mlp_post_norm.as_mut(),
            _ => self.linear_mut(biased(part)?)?.bias.as_mut(),
        }
    }
}

/// The linear layer whose bias sits at `bias`.
fn biased(bias: Part) -> Option<Part> {
    Part::ALL.into_iter().find(|p| p.bias() == Some(bias))
}
