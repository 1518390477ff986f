//! The wiring of a bidirectional encoder (BERT, MiniLM): written once, asking at every site whether a brick sits there.

mod config;
mod embed;
mod files;
mod pooling;
mod save;
mod similarity;

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::module::layer_norm;
use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Part, Run, Seed, Site, SiteTable};
use firebrick_tensor::ops::{self, AttentionOptions, Precision};

use crate::error::ModelError;
use crate::family::bert::{self, EncoderTensor};

pub use config::EncoderConfig;
pub use embed::{EmbedOptions, EncoderModel};
pub use files::{EncoderFiles, EncoderWeights};
pub use pooling::{Pooling, SentenceConfig, normalize, pool};
pub use similarity::{cosine, cosine_matrix};

/// A bidirectional transformer encoder of the BERT family (arXiv 1810.04805): learned positions, token types, biases, the
/// exact GELU, and LayerNorm on each sum with the residual.
///
/// Sites are those of [`Decoder`](crate::Decoder), less what an encoder has not (`mlp.gate`, `head`, the norms in front of
/// the sublayers). `attn_post_norm` and `mlp_post_norm` are the norms behind the residual add: their input is the sum. At
/// `embed` the rows of the word embedding come in, and what the first block reads goes out.
///
/// Texts of different lengths share a batch if the [`Run`] holds a [`Padding`], token types other than 0 are given as
/// [`TokenTypes`]:
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use firebrick_core::{Run, Seed};
/// use firebrick_models::{Encoder, EncoderConfig, Padding, Pooling, pool};
///
/// let device = Device::flex();
/// let encoder = Encoder::random(EncoderConfig::tiny(40), Seed(1), &device)?;
/// let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4], [5, 6, 0, 0]], &device);
/// let mut run = Run::default();
/// run.insert(Padding::new(vec![4, 2]));
/// let hidden = encoder.hidden(tokens, &mut run);
/// let vectors = pool(hidden, run.get::<Padding>(), Pooling::Mean);
/// assert_eq!(vectors.dims(), [2, encoder.config().d_model]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Module, Debug)]
pub struct Encoder {
    words: Param<Tensor<2>>,
    positions: Param<Tensor<2>>,
    types: Param<Tensor<2>>,
    embed_norm: Norm,
    layers: Vec<Layer>,
    pooler: Option<Linear>,
    #[module(skip)]
    shape: Shape,
}

#[derive(Clone, Debug)]
struct Shape {
    config: Arc<EncoderConfig>,
    sites: Arc<SiteTable>,
}

#[derive(Module, Debug)]
struct Norm {
    weight: Param<Tensor<1>>,
    bias: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Layer {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    attn_norm: Norm,
    up: Linear,
    down: Linear,
    mlp_norm: Norm,
}

/// The lengths of the texts of a batch that is filled up at the end, as state of a [`Run`].
///
/// What lies behind a text is no key of attention. It flows through every other site like a token, and its hidden
/// states mean nothing; bricks that sum over tokens can ask the run for this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Padding {
    lengths: Vec<usize>,
}

impl Padding {
    /// Text `i` of the batch has `lengths[i]` tokens.
    ///
    /// # Panics
    /// If a text has no tokens.
    pub fn new(lengths: Vec<usize>) -> Self {
        assert!(lengths.iter().all(|n| *n > 0), "a text without tokens");
        Padding { lengths }
    }

    /// Tokens of each text.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// 1 where a text has a token and 0 behind it, `[batch, tokens, 1]`.
    pub fn mask(&self, tokens: usize, device: &Device) -> Tensor<3> {
        let row = |n: &usize| (0..tokens).map(|i| if i < *n { 1.0 } else { 0.0 }).collect::<Vec<f32>>();
        let values: Vec<f32> = self.lengths.iter().flat_map(row).collect();
        Tensor::from_data(TensorData::new(values, [self.lengths.len(), tokens, 1]), device)
    }

    /// Neighbouring texts of equal length: the first, how many, and their length.
    fn groups(&self) -> Vec<(usize, usize, usize)> {
        let mut groups: Vec<(usize, usize, usize)> = Vec::new();
        for (i, n) in self.lengths.iter().enumerate() {
            match groups.last_mut() {
                Some(group) if group.2 == *n => group.1 += 1,
                _ => groups.push((i, 1, *n)),
            }
        }
        groups
    }

    fn check(&self, batch: usize, tokens: usize) {
        assert_eq!(self.lengths.len(), batch, "padding of another batch");
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        assert!(longest <= tokens, "a text of {longest} tokens in {tokens}");
    }
}

/// The token types (segments) `[batch, tokens]` of a batch, as state of a [`Run`]; without them all are 0.
#[derive(Clone, Debug)]
pub struct TokenTypes(pub Tensor<2, Int>);

/// The flat values of a tensor, by what it is and its shape in Hugging Face's layout.
type Values<'a> = dyn FnMut(EncoderTensor, &[usize]) -> Result<Tensor<1>, ModelError> + 'a;

impl Encoder {
    /// Loads the weights of `config` from `weights` onto `device`, as constants (see [`Encoder::trainable`]).
    ///
    /// # Errors
    /// If `config` is impossible, or a weight cannot be read. Every missing tensor and every tensor of the wrong shape is
    /// listed, before anything is read.
    pub fn load(
        config: EncoderConfig,
        weights: &EncoderWeights<'_>,
        device: &Device,
    ) -> Result<Self, ModelError> {
        possible(&config)?;
        // Sizes that only the configuration claims are not to be allocated.
        let problems: Vec<String> = bert::tensors(&config)
            .iter()
            .filter_map(|(tensor, shape)| weights.check(*tensor, shape).err())
            .map(|e| e.to_string())
            .collect();
        if !problems.is_empty() {
            return Err(ModelError::Weights { problems });
        }
        Self::build(config, &mut |tensor, shape| {
            let values = weights.read(tensor, shape)?;
            let n = values.len();
            Ok(Tensor::from_data(TensorData::new(values, [n]), device))
        })
        .map(|e| e.no_grad())
    }

    /// An encoder with random weights: normal with standard deviation 0.02 (BERT), biases 0, norms 1.
    ///
    /// # Errors
    /// If `config` is impossible; every reason is listed.
    pub fn random(config: EncoderConfig, seed: Seed, device: &Device) -> Result<Self, ModelError> {
        possible(&config)?;
        Self::build(config, &mut |tensor, shape| {
            use EncoderTensor::*;
            let n: usize = shape.iter().product();
            let values = match (tensor, shape.len()) {
                (Bias(_) | EmbedNormBias | PoolerBias, _) => vec![0.0; n],
                (_, 1) => vec![1.0; n],
                _ => seed.normal(&format!("encoder.init/{tensor:?}"), n, 0.02),
            };
            Ok(Tensor::from_data(TensorData::new(values, [n]), device))
        })
        .map(|e| e.no_grad())
    }

    fn build(config: EncoderConfig, values: &mut Values<'_>) -> Result<Self, ModelError> {
        use EncoderTensor::*;
        let sites = bert::site_table(&config);
        let c = &config;
        let d = c.d_model;
        let mut matrix = |tensor: EncoderTensor, rows: usize, cols: usize| {
            let flat = values(tensor, &[rows, cols])?;
            Ok::<_, ModelError>(Param::from_tensor(flat.reshape([rows, cols])))
        };
        let words = matrix(Weight(Site::global(Part::Embed)), c.vocab, d)?;
        let positions = matrix(Positions, c.max_tokens, d)?;
        let types = matrix(TokenTypes, c.token_types, d)?;
        let norm = |weight, bias, values: &mut Values<'_>| {
            let mut row = |tensor| Ok::<_, ModelError>(Param::from_tensor(values(tensor, &[d])?));
            Ok::<_, ModelError>(Norm { weight: row(weight)?, bias: row(bias)? })
        };
        let embed_norm = norm(EmbedNormWeight, EmbedNormBias, values)?;
        let linear = |weight, bias, (d_in, d_out): (usize, usize), values: &mut Values<'_>| {
            let matrix = values(weight, &[d_out, d_in])?.reshape([d_out, d_in]).transpose();
            let bias = Some(Param::from_tensor(values(bias, &[d_out])?));
            Ok::<_, ModelError>(Linear { weight: Param::from_tensor(matrix), bias })
        };
        let mut layers = Vec::with_capacity(c.layers);
        for l in 0..c.layers {
            let mut at = |part| {
                let site = Site::layer(l, part);
                let widths = sites.linear(site).expect("the family's table has this linear layer");
                linear(Weight(site), Bias(site), widths, values)
            };
            let (q, k, v, o) = (at(Part::AttnQ)?, at(Part::AttnK)?, at(Part::AttnV)?, at(Part::AttnO)?);
            let (up, down) = (at(Part::MlpUp)?, at(Part::MlpDown)?);
            let mut norm_at = |part| {
                let site = Site::layer(l, part);
                norm(Weight(site), Bias(site), values)
            };
            let (attn_norm, mlp_norm) = (norm_at(Part::AttnPostNorm)?, norm_at(Part::MlpPostNorm)?);
            layers.push(Layer { q, k, v, o, attn_norm, up, down, mlp_norm });
        }
        let pooler = c.pooler.then(|| linear(PoolerWeight, PoolerBias, (d, d), values)).transpose()?;
        let shape = Shape { sites: Arc::new(sites), config: Arc::new(config) };
        Ok(Encoder { words, positions, types, embed_norm, layers, pooler, shape })
    }

    /// The same encoder with all weights trainable (for full fine-tuning), on a device that records gradients.
    pub fn trainable(self) -> Self {
        self.set_require_grad(true)
    }

    /// The shape of the model.
    pub fn config(&self) -> &EncoderConfig {
        &self.shape.config
    }

    /// The sites of the model.
    pub fn sites(&self) -> &SiteTable {
        &self.shape.sites
    }

    /// The device the weights are on.
    pub fn device(&self) -> Device {
        self.words.val().device()
    }

    /// The weight at `site` in Hugging Face's layout: `[d_out, d_in]` for linear layers, `[vocab, d_model]` for the
    /// embedding, `[1, d_model]` for norms; `None` where the site has no weight of its own.
    pub fn weight(&self, site: Site) -> Option<Tensor<2>> {
        if site == Site::global(Part::Embed) {
            return Some(self.words.val());
        }
        let layer = self.layers.get(site.layer?)?;
        match layer.norm(site.part) {
            Some(norm) => Some(norm.weight.val().unsqueeze_dim(0)),
            None => layer.linear(site.part).map(|l| l.weight.val().transpose()),
        }
    }

    /// The bias at `site`, `[d_out]` or `[d_model]`; `None` where the site has none.
    pub fn bias(&self, site: Site) -> Option<Tensor<1>> {
        let layer = self.layers.get(site.layer?)?;
        match layer.norm(site.part) {
            Some(norm) => Some(norm.bias.val()),
            None => layer.linear(site.part)?.bias.as_ref().map(Param::val),
        }
    }

    /// The same encoder with the weight of the linear layer at `site` replaced by `weight: [d_out, d_in]`, a constant; the
    /// bias stays.
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

    /// The values of a tensor, row-major in Hugging Face's layout; `None` if the encoder has no such tensor.
    pub(crate) fn values(&self, tensor: EncoderTensor) -> Option<Tensor<1>> {
        use EncoderTensor::*;
        let flat = |t: Tensor<2>| {
            let [rows, cols] = t.dims();
            t.reshape([rows * cols])
        };
        match tensor {
            Weight(site) => self.weight(site).map(flat),
            Bias(site) => self.bias(site),
            Positions => Some(flat(self.positions.val())),
            TokenTypes => Some(flat(self.types.val())),
            EmbedNormWeight => Some(self.embed_norm.weight.val()),
            EmbedNormBias => Some(self.embed_norm.bias.val()),
            PoolerWeight => self.pooler.as_ref().map(|l| flat(l.weight.val().transpose())),
            PoolerBias => self.pooler.as_ref()?.bias.as_ref().map(Param::val),
        }
    }

    /// The hidden states `[batch, tokens, d_model]` of `tokens: [batch, tokens]` behind the last block. With a [`Padding`]
    /// or [`TokenTypes`] in `run`, texts may differ in length and have types.
    ///
    /// # Panics
    /// If there are more tokens than the model has positions, or the padding is that of another batch.
    pub fn hidden(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        let mut x = self.embed(tokens, run);
        for layer in 0..self.layers.len() {
            x = self.block(layer, x, run);
        }
        x
    }

    /// What the first block reads, `[batch, tokens, d_model]`: words, positions and types of `tokens: [batch, tokens]`,
    /// added and normed.
    ///
    /// # Panics
    /// As [`Encoder::hidden`].
    pub fn embed(&self, tokens: Tensor<2, Int>, run: &mut Run<'_>) -> Tensor<3> {
        let [batch, length] = tokens.dims();
        let c = self.config();
        assert!(length <= c.max_tokens, "{length} tokens; the model has {} positions", c.max_tokens);
        if let Some(padding) = run.get::<Padding>() {
            padding.check(batch, length);
        }
        run.tokens = Some(tokens.clone());
        let rows = |table: &Param<Tensor<2>>, ids: Tensor<2, Int>| {
            table.val().select(0, ids.reshape([batch * length])).reshape([batch, length, c.d_model])
        };
        let types = match run.get::<TokenTypes>() {
            Some(types) => rows(&self.types, types.0.clone()),
            None => self.types.val().narrow(0, 0, 1).unsqueeze_dim(0),
        };
        let positions: Tensor<3> = self.positions.val().narrow(0, 0, length).unsqueeze_dim(0);
        run.at(Site::global(Part::Embed), rows(&self.words, tokens), &mut |x, _| {
            self.embed_norm.forward(x + types.clone() + positions.clone(), c.norm_eps)
        })
    }

    /// Runs block `layer` alone on the residual stream `x: [batch, tokens, d_model]`.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn block(&self, layer: usize, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let site = |part| Site::layer(layer, part);
        let this = &self.layers[layer];
        run.at(site(Part::Block), x, &mut |x, run: &mut Run<'_>| {
            let x = run.at(site(Part::AttnSublayer), x, &mut |x, run: &mut Run<'_>| {
                let branch = run.at(site(Part::Attn), x.clone(), &mut |x, run: &mut Run<'_>| {
                    self.attention(layer, x, run)
                });
                self.norm_at(site(Part::AttnPostNorm), &this.attn_norm, x + branch, run)
            });
            run.at(site(Part::MlpSublayer), x, &mut |x, run: &mut Run<'_>| {
                let branch = run.at(site(Part::Mlp), x.clone(), &mut |x, run: &mut Run<'_>| {
                    let up = run.at(site(Part::MlpUp), x, &mut |x, _| linear(&this.up, x));
                    let inner = ops::gelu(up);
                    run.at(site(Part::MlpDown), inner, &mut |x, _| linear(&this.down, x))
                });
                self.norm_at(site(Part::MlpPostNorm), &this.mlp_norm, x + branch, run)
            })
        })
    }

    /// BERT's pooler, `tanh(W h_0 + b): [batch, d_model]`, of `hidden: [batch, tokens, d_model]`; `None` if the model has
    /// none. Sentence encoders leave it aside, see [`pool`].
    pub fn pooler(&self, hidden: Tensor<3>) -> Option<Tensor<2>> {
        let pooler = self.pooler.as_ref()?;
        Some(pooler.forward(pool(hidden, None, Pooling::Cls)).tanh())
    }

    fn norm_at(&self, site: Site, norm: &Norm, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let eps = self.config().norm_eps;
        run.at(site, x, &mut |x, _| norm.forward(x, eps))
    }

    fn attention(&self, l: usize, x: Tensor<3>, run: &mut Run<'_>) -> Tensor<3> {
        let (c, layer) = (self.config(), &self.layers[l]);
        let site = |part| Site::layer(l, part);
        let [batch, length, _] = x.dims();
        let heads = |t: Tensor<3>| t.reshape([batch, length, c.heads, c.head_dim()]).swap_dims(1, 2);
        let q = run.at(site(Part::AttnQ), x.clone(), &mut |x, _| linear(&layer.q, x));
        let k = run.at(site(Part::AttnK), x.clone(), &mut |x, _| linear(&layer.k, x));
        let v = run.at(site(Part::AttnV), x, &mut |x, _| linear(&layer.v, x));
        let scale = (c.head_dim() as f64).powf(-0.5);
        let mixed = attend(heads(q), heads(k), heads(v), scale, run.get::<Padding>());
        let mixed = mixed.swap_dims(1, 2).reshape([batch, length, c.d_model]);
        run.at(site(Part::AttnO), mixed, &mut |x, _| linear(&layer.o, x))
    }
}

/// A linear layer with its bias, on `x: [batch, tokens, d_in]`.
fn linear(layer: &Linear, x: Tensor<3>) -> Tensor<3> {
    let y = ops::linear(x, layer.weight.val(), Precision::F32);
    match &layer.bias {
        Some(bias) => y + bias.val().unsqueeze(),
        None => y,
    }
}

/// Attention of every token to every token of its text, `q, k, v: [batch, heads, tokens, head_dim]`; 0 behind a text.
///
/// Texts of equal length go together and without what lies behind them: no mask, and nothing computed for nothing.
fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, scale: f64, padding: Option<&Padding>) -> Tensor<4> {
    let options = AttentionOptions { scale, causal: false, window: None, softcap: None };
    let Some(padding) = padding else { return ops::attention(q, k, v, options) };
    let [batch, heads, tokens, width] = q.dims();
    padding.check(batch, tokens);
    let mut parts = Vec::new();
    for (first, texts, length) in padding.groups() {
        let part = |t: &Tensor<4>| t.clone().narrow(0, first, texts).narrow(2, 0, length);
        let mixed = ops::attention(part(&q), part(&k), part(&v), options.clone());
        parts.push(match tokens - length {
            0 => mixed,
            rest => {
                let zeros = Tensor::zeros([texts, heads, rest, width], &mixed.device());
                Tensor::cat(vec![mixed, zeros], 2)
            }
        });
    }
    Tensor::cat(parts, 0)
}

/// Fails with every reason why there is no such encoder.
fn possible(config: &EncoderConfig) -> Result<(), ModelError> {
    match config.problems() {
        problems if problems.is_empty() => Ok(()),
        problems => Err(ModelError::Invalid { path: "config.json".into(), problems }),
    }
}

impl Norm {
    fn forward(&self, x: Tensor<3>, eps: f64) -> Tensor<3> {
        layer_norm(x, self.weight.val(), Some(self.bias.val()), eps)
    }
}

impl Layer {
    fn norm(&self, part: Part) -> Option<&Norm> {
        match part {
            Part::AttnPostNorm => Some(&self.attn_norm),
            Part::MlpPostNorm => Some(&self.mlp_norm),
            _ => None,
        }
    }

    fn linear(&self, part: Part) -> Option<&Linear> {
        match part {
            Part::AttnQ => Some(&self.q),
            Part::AttnK => Some(&self.k),
            Part::AttnV => Some(&self.v),
            Part::AttnO => Some(&self.o),
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
            Part::MlpUp => Some(&mut self.up),
            Part::MlpDown => Some(&mut self.down),
            _ => None,
        }
    }
}
