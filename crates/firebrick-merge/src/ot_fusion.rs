//! Fusion of transformers by optimal transport (arXiv 2310.05719): the units of one model, be they of another order or number, are
//! carried layer by layer onto those of another, then both are averaged.
//!
//! A plan meets a weight in two ways: in front of it each unit passes on all it has (rows that add up to 1), behind it each unit is
//! the mean of those it comes from (columns that do). With one normalization for both, models of different widths are off
//! by the ratio of the widths. Heads are carried whole, queries with their keys, because rotary positions tie
//! the order inside; the values inside a head, which nothing ties, have plans of their own.

use std::collections::BTreeMap;

use burn::tensor::{Int, Tensor};
use firebrick_core::{Brick, Part, Run, Site, Tap, Taps};
use firebrick_models::{Decoder, DecoderConfig};
use firebrick_tensor::linalg::Matrix;

use crate::task_vectors::{TaskVector, TaskVectorError, beside};
use crate::transport::{Plan, exact, sinkhorn};

/// How a plan is found; costs are divided by the largest first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Solver {
    /// Hard: the plan of least cost.
    Exact,
    /// Soft: with an entropy term of this weight (the paper: 0.06 to 0.08).
    Sinkhorn {
        /// More than 0.
        regularization: f64,
    },
}

impl Solver {
    fn solve(self, cost: &Matrix) -> Result<Plan, TaskVectorError> {
        let largest = cost.data().iter().fold(0.0, |m: f64, c| m.max(*c));
        let unit = if largest > 0.0 { 1.0 / largest } else { 1.0 };
        let cost = Matrix::from_fn(cost.rows(), cost.cols(), |i, j| cost[(i, j)] * unit);
        Ok(match self {
            Solver::Exact => exact(&cost)?,
            Solver::Sinkhorn { regularization } => sinkhorn(&cost, regularization)?,
        })
    }
}

/// The plan of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// The streams are the same: models of a common ancestor.
    Identity,
    /// One plan all the way (the paper's `only_resid`): the only one that a function survives whose head is its embedding.
    Stream,
    /// That of the last branch added (`no_resid`).
    Branch,
    /// The mean of the branch's and of the stream's before it (`mean`, the paper's default).
    Mean,
}

/// Settings of a fusion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OtFusion {
    /// For hidden units, values inside a head and the residual stream.
    pub units: Solver,
    /// For groups of heads and heads in a group; soft plans mix heads, which changes what they attend to.
    pub heads: Solver,
    /// For the residual stream.
    pub residual: Residual,
}

impl Default for OtFusion {
    /// Hard, one plan for the stream.
    fn default() -> Self {
        OtFusion { units: Solver::Exact, heads: Solver::Exact, residual: Residual::Stream }
    }
}

/// The plans of one layer, from the other model's units (rows) to the anchor's (columns).
#[derive(Clone, Debug, PartialEq)]
pub struct LayerPlans {
    /// Query heads.
    pub heads: Plan,
    /// Key and value heads.
    pub kv_heads: Plan,
    /// Rows of the value projection.
    pub values: Plan,
    /// Hidden units of the feed-forward network.
    pub mlp: Plan,
}

/// A model carried onto another.
#[derive(Clone, Debug, PartialEq)]
pub struct OtAlignment {
    /// The other model's weights in the anchor's shapes.
    pub aligned: TaskVector,
    /// The stream in front of each sublayer and of the last norm, `2 layers + 1` plans.
    pub stream: Vec<Plan>,
    /// One entry a layer.
    pub layers: Vec<LayerPlans>,
}

impl OtAlignment {
    /// `(1 - share) anchor + share aligned`; the paper's share is 0.5.
    ///
    /// # Errors
    /// Weights of another model than the anchor's.
    pub fn fuse(&self, anchor: &TaskVector, share: f64) -> Result<TaskVector, TaskVectorError> {
        anchor.clone().times(1.0 - share).plus(&self.aligned, share)
    }
}

impl OtFusion {
    /// Carries `other` onto `anchor`. Units are compared by what they do on `tokens: [batch, tokens]` (standardized activations) if there
    /// are some, else by their incoming weights, seen through the plans found before.
    ///
    /// The models may differ in the widths of the stream and of the feed-forward network, and in the numbers of heads.
    ///
    /// # Errors
    /// Models that differ in anything else, or a plan of the stream that these models have no use for (every problem is listed);
    /// weights that are not finite; plans that are not found.
    pub fn align(
        &self,
        anchor: &Decoder,
        other: &Decoder,
        tokens: Option<Tensor<2, Int>>,
    ) -> Result<OtAlignment, TaskVectorError> {
        let problems = self.problems(other.config(), anchor.config());
        if !problems.is_empty() {
            return Err(TaskVectorError::Mismatch { problems });
        }
        let (a, b) = (Side::new(other, tokens.clone())?, Side::new(anchor, tokens)?);
        let mut walk = Walk { settings: self, a: &a, b: &b, aligned: TaskVector::default() };
        let mut plan = walk.stream()?;
        walk.writes(Site::global(Part::Embed), &plan, true)?;
        let (mut stream, mut layers) = (vec![plan.clone()], Vec::new());
        for layer in 0..a.config.layers {
            let (heads, kv_heads, values, branch) = walk.attention(layer, &plan)?;
            plan = walk.after(&plan, branch);
            stream.push(plan.clone());
            let (mlp, branch) = walk.mlp(layer, &plan)?;
            plan = walk.after(&plan, branch);
            stream.push(plan.clone());
            layers.push(LayerPlans { heads, kv_heads, values, mlp });
        }
        walk.vector(Site::global(Part::Norm), &plan)?;
        if !a.config.tied_head {
            let head = Site::global(Part::Head);
            let moved = a.weight(head).matmul(&plan.incoming())?;
            walk.aligned.sites.insert(head, moved);
        }
        Ok(OtAlignment { aligned: walk.aligned, stream, layers })
    }

    fn problems(&self, a: &DecoderConfig, b: &DecoderConfig) -> Vec<String> {
        const FREE: [&str; 7] = ["d_model", "d_ff", "heads", "kv_heads", "max_tokens", "model_type", "extra"];
        let fields = |c: &DecoderConfig| match serde_json::to_value(c) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let (a_fields, b_fields) = (fields(a), fields(b));
        let mut keys: Vec<&String> = a_fields.keys().chain(b_fields.keys()).collect();
        keys.sort();
        keys.dedup();
        let value = |of: Option<&serde_json::Value>| of.map_or("the default".into(), |v| v.to_string());
        let mut problems: Vec<String> = keys
            .into_iter()
            .filter(|k| !FREE.contains(&k.as_str()) && a_fields.get(*k) != b_fields.get(*k))
            .map(|k| format!("`{k}` is {} and {}", value(a_fields.get(k)), value(b_fields.get(k))))
            .collect();
        let widths = format!("streams {} and {} wide", a.d_model, b.d_model);
        if a.d_model != b.d_model && self.residual == Residual::Identity {
            problems.push(format!("{widths} are not the same stream"));
        }
        if a.d_model != b.d_model && (a.tied_head || a.scaled_embedding) {
            problems.push(format!("{widths}, and an embedding that is the head or scaled by the width"));
        }
        if a.tied_head && matches!(self.residual, Residual::Branch | Residual::Mean) {
            problems.push("a head that is the embedding takes one plan of the stream all the way".into());
        }
        problems
    }
}

/// A model, and what its units do where that is asked for.
struct Side {
    weights: TaskVector,
    config: DecoderConfig,
    /// Standardized, `[units, samples]`.
    seen: Option<BTreeMap<Seen, Matrix>>,
}

/// What is looked at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    /// The stream that enters a sublayer.
    Stream(Site),
    /// What a sublayer adds.
    Branch(Site),
    /// The output of a projection, or the input of `mlp.down`.
    Units(Site),
}

impl Side {
    fn new(decoder: &Decoder, tokens: Option<Tensor<2, Int>>) -> Result<Side, TaskVectorError> {
        let seen = tokens.map(|t| activations(decoder, t)).transpose()?;
        Ok(Side { weights: TaskVector::of(decoder)?, config: decoder.config().clone(), seen })
    }

    /// # Panics
    /// If there is no weight there: the families have all of those asked for.
    fn weight(&self, site: Site) -> &Matrix {
        &self.weights.sites[&site]
    }

    /// The projection at `site` as it reads the stream in front of the norm at `norm`, `[d_out, d_model]`.
    fn reader(&self, site: Site, norm: Part) -> Matrix {
        let (w, gain) = (self.weight(site), self.weight(Site { part: norm, ..site }));
        let one = if self.config.norm_plus_one { 1.0 } else { 0.0 };
        Matrix::from_fn(w.rows(), w.cols(), |i, j| w[(i, j)] * (gain[(0, j)] + one))
    }

    /// All streams side by side, that in front of the first sublayer first.
    fn streams(seen: &BTreeMap<Seen, Matrix>) -> Vec<Matrix> {
        seen.iter().filter(|(s, _)| matches!(s, Seen::Stream(_))).map(|(_, m)| m.clone()).collect()
    }
}

fn activations(decoder: &Decoder, tokens: Tensor<2, Int>) -> Result<BTreeMap<Seen, Matrix>, TaskVectorError> {
    let parts = [Part::AttnSublayer, Part::MlpSublayer, Part::AttnQ, Part::AttnK, Part::AttnV, Part::MlpDown];
    let layers = 0..decoder.config().layers;
    let tap = Tap { sites: layers.flat_map(|l| parts.map(|p| Site::layer(l, p))).collect() };
    let bricks: [&dyn Brick; 1] = [&tap];
    let mut run = Run::new(&bricks);
    decoder.hidden(tokens, &mut run);
    let mut seen = BTreeMap::new();
    for (site, x, y) in run.take::<Taps>().unwrap_or_default().seen {
        match site.part {
            Part::AttnSublayer | Part::MlpSublayer => {
                seen.insert(Seen::Branch(site), standardized(y - x.clone())?);
                seen.insert(Seen::Stream(site), standardized(x)?);
            }
            Part::MlpDown => drop(seen.insert(Seen::Units(site), standardized(x)?)),
            _ => drop(seen.insert(Seen::Units(site), standardized(y)?)),
        }
    }
    Ok(seen)
}

/// Each unit of `x: [batch, tokens, units]` with mean 0 and deviation 1, `[units, batch * tokens]`.
fn standardized(x: Tensor<3>) -> Result<Matrix, TaskVectorError> {
    let [batch, tokens, units] = x.dims();
    let values: Vec<f32> = x.without_autodiff().into_data().iter::<f32>().collect();
    let mut m = Matrix::from_f32(batch * tokens, units, &values)?.transpose();
    let n = (batch * tokens) as f64;
    for row in m.data_mut().chunks_mut(batch * tokens) {
        let mean = row.iter().sum::<f64>() / n;
        row.iter_mut().for_each(|v| *v -= mean);
        let deviation = (row.iter().map(|v| v * v).sum::<f64>() / n).sqrt() + 1e-9;
        row.iter_mut().for_each(|v| *v /= deviation);
    }
    Ok(m)
}

/// Squared distances `[n, m]` between the rows of `a: [n, d]` and of `b: [m, d]`.
fn squared(a: &Matrix, b: &Matrix) -> Result<Matrix, TaskVectorError> {
    let norms =
        |m: &Matrix| -> Vec<f64> { (0..m.rows()).map(|i| m.row(i).iter().map(|v| v * v).sum()).collect() };
    let (inner, a, b) = (a.matmul(&b.transpose())?, norms(a), norms(b));
    let distance = |i: usize, j: usize| a[i] + b[j] - 2.0 * inner[(i, j)];
    // Not `max`, which would make 0 of what is not a number: such costs are refused later.
    Ok(Matrix::from_fn(a.len(), b.len(), |i, j| match distance(i, j) {
        d if d < 0.0 => 0.0,
        d => d,
    }))
}

fn roots(m: &Matrix) -> Matrix {
    Matrix::from_fn(m.rows(), m.cols(), |i, j| m[(i, j)].sqrt())
}

/// Rows `from..from + n`.
fn rows(m: &Matrix, from: usize, n: usize) -> Matrix {
    Matrix::from_fn(n, m.cols(), |i, j| m[(from + i, j)])
}

/// Each `height` rows as one.
fn stacked(m: &Matrix, height: usize) -> Result<Matrix, TaskVectorError> {
    Ok(Matrix::new(m.rows() / height, m.cols() * height, m.data().to_vec())?)
}

/// `other` (a) on its way onto `anchor` (b).
struct Walk<'a> {
    settings: &'a OtFusion,
    a: &'a Side,
    b: &'a Side,
    aligned: TaskVector,
}

impl Walk<'_> {
    /// The plan between the rows of two supports.
    fn units(&self, a: &Matrix, b: &Matrix) -> Result<Plan, TaskVectorError> {
        self.settings.units.solve(&roots(&squared(a, b)?))
    }

    /// What was seen of both models, if anything.
    fn seen(&self, what: Seen) -> Option<(Matrix, Matrix)> {
        Some((self.a.seen.as_ref()?.get(&what)?.clone(), self.b.seen.as_ref()?.get(&what)?.clone()))
    }

    /// The projections at `site` as supports: what they put out, or how they read the stream.
    fn support(&self, site: Site, norm: Part, stream: &Plan) -> Result<(Matrix, Matrix), TaskVectorError> {
        if let Some(seen) = self.seen(Seen::Units(site)) {
            return Ok(seen);
        }
        Ok((self.a.reader(site, norm).matmul(&stream.incoming())?, self.b.reader(site, norm)))
    }

    /// The plan of the stream behind the embedding.
    fn stream(&self) -> Result<Plan, TaskVectorError> {
        if self.settings.residual == Residual::Identity {
            return Ok(Plan::identity(self.a.config.d_model));
        }
        let (mut a, mut b) = match (&self.a.seen, &self.b.seen) {
            (Some(a), Some(b)) => (Side::streams(a), Side::streams(b)),
            _ => {
                let embed = Site::global(Part::Embed);
                (vec![self.a.weight(embed).transpose()], vec![self.b.weight(embed).transpose()])
            }
        };
        if self.settings.residual != Residual::Stream {
            a.truncate(1);
            b.truncate(1);
        }
        self.units(&beside(&a), &beside(&b))
    }

    /// The plan of what a sublayer adds, where it is not that of the stream.
    fn branch(&self, sublayer: Site, writer: Site, inner: &Plan) -> Result<Option<Plan>, TaskVectorError> {
        if !matches!(self.settings.residual, Residual::Branch | Residual::Mean) {
            return Ok(None);
        }
        if let Some((a, b)) = self.seen(Seen::Branch(sublayer)) {
            return self.units(&a, &b).map(Some);
        }
        let a = self.a.weight(writer).matmul(&inner.incoming())?;
        self.units(&a, self.b.weight(writer)).map(Some)
    }

    /// The plan of the stream after a branch was added to it.
    fn after(&self, stream: &Plan, branch: Option<Plan>) -> Plan {
        match branch {
            None => stream.clone(),
            Some(branch) if self.settings.residual == Residual::Branch => branch,
            Some(branch) => {
                let (s, b) = (&stream.mass, &branch.mass);
                Plan { mass: Matrix::from_fn(s.rows(), s.cols(), |i, j| (s[(i, j)] + b[(i, j)]) / 2.0) }
            }
        }
    }

    /// Puts the weight at `site` behind `plan`: that of its rows, or of its columns where rows are tokens.
    fn writes(&mut self, site: Site, plan: &Plan, by_token: bool) -> Result<(), TaskVectorError> {
        let (w, out) = (self.a.weight(site), plan.outgoing());
        let moved = if by_token { w.matmul(&out)? } else { out.transpose().matmul(w)? };
        self.aligned.sites.insert(site, moved);
        Ok(())
    }

    /// The norm or bias at `site`, if there is one, as its units stand in the anchor.
    fn vector(&mut self, site: Site, plan: &Plan) -> Result<(), TaskVectorError> {
        if self.a.weights.sites.contains_key(&site) {
            self.writes(site, plan, true)?;
        }
        Ok(())
    }

    /// The linear layer at `site` with its bias, between two plans.
    fn linear(&mut self, site: Site, input: &Plan, output: &Plan) -> Result<(), TaskVectorError> {
        let moved = output.outgoing().transpose().matmul(&self.a.weight(site).matmul(&input.incoming())?)?;
        self.aligned.sites.insert(site, moved);
        site.part.bias().map_or(Ok(()), |part| self.vector(Site { part, ..site }, output))
    }

    /// Moves the attention of a layer; the plans of its heads and values, and that of its branch.
    fn attention(
        &mut self,
        layer: usize,
        stream: &Plan,
    ) -> Result<(Plan, Plan, Plan, Option<Plan>), TaskVectorError> {
        let site = |part| Site::layer(layer, part);
        let width = self.a.config.head_dim;
        let (a_groups, b_groups) = (self.a.config.kv_heads, self.b.config.kv_heads);
        let (a_each, b_each) = (self.a.config.heads / a_groups, self.b.config.heads / b_groups);
        let q = self.support(site(Part::AttnQ), Part::AttnNorm, stream)?;
        let k = self.support(site(Part::AttnK), Part::AttnNorm, stream)?;
        let v = self.support(site(Part::AttnV), Part::AttnNorm, stream)?;
        let (q, k) =
            ((stacked(&q.0, width)?, stacked(&q.1, width)?), (stacked(&k.0, width)?, stacked(&k.1, width)?));
        let k = squared(&k.0, &k.1)?;
        // For each pair of groups: the plan of heads inside, that of values, and what both cost by row.
        let (mut inside, mut inner) = (Vec::new(), Vec::new());
        let mut cost = Matrix::zeros(a_groups, b_groups);
        for i in 0..a_groups {
            for j in 0..b_groups {
                let heads = squared(&rows(&q.0, i * a_each, a_each), &rows(&q.1, j * b_each, b_each))?;
                let values = squared(&rows(&v.0, i * width, width), &rows(&v.1, j * width, width))?;
                let heads_plan = self.settings.heads.solve(&roots(&heads))?;
                let values_plan = self.settings.units.solve(&roots(&values))?;
                let by_row = (heads_plan.cost(&heads) + k[(i, j)]) / width as f64;
                cost[(i, j)] = (by_row + values_plan.cost(&values)).sqrt();
                inside.push(heads_plan);
                inner.push(values_plan);
            }
        }
        let kv_heads = self.settings.heads.solve(&cost)?;
        let same = Plan::identity(width).mass;
        let plan = |n: usize, m: usize, mass: &dyn Fn(usize, usize) -> f64| Plan {
            mass: Matrix::from_fn(n, m, mass),
        };
        let heads = plan(a_groups * a_each, b_groups * b_each, &|x, y| {
            let (i, j) = (x / a_each, y / b_each);
            kv_heads.mass[(i, j)] * inside[i * b_groups + j].mass[(x % a_each, y % b_each)]
        });
        let values = plan(a_groups * width, b_groups * width, &|x, y| {
            let (i, j) = (x / width, y / width);
            kv_heads.mass[(i, j)] * inner[i * b_groups + j].mass[(x % width, y % width)]
        });
        let whole = |heads: &Plan| {
            plan(heads.mass.rows() * width, heads.mass.cols() * width, &|x, y| {
                heads.mass[(x / width, y / width)] * same[(x % width, y % width)]
            })
        };
        // What a head passes on is its group's values, averaged over positions.
        let mixed = plan(heads.mass.rows() * width, heads.mass.cols() * width, &|x, y| {
            let (i, j) = (x / (a_each * width), y / (b_each * width));
            heads.mass[(x / width, y / width)] * inner[i * b_groups + j].mass[(x % width, y % width)]
        });
        self.vector(site(Part::AttnNorm), stream)?;
        self.linear(site(Part::AttnQ), stream, &whole(&heads))?;
        self.linear(site(Part::AttnK), stream, &whole(&kv_heads))?;
        self.linear(site(Part::AttnV), stream, &values)?;
        for norm in [Part::AttnQNorm, Part::AttnKNorm] {
            // Of one head, for all.
            self.vector(site(norm), &Plan::identity(width))?;
        }
        let branch = self.branch(site(Part::AttnSublayer), site(Part::AttnO), &mixed)?;
        let output = branch.as_ref().unwrap_or(stream);
        self.linear(site(Part::AttnO), &mixed, output)?;
        self.vector(site(Part::AttnPostNorm), output)?;
        Ok((heads, kv_heads, values, branch))
    }

    /// Moves the feed-forward network of a layer; the plan of its hidden units, and that of its branch.
    fn mlp(&mut self, layer: usize, stream: &Plan) -> Result<(Plan, Option<Plan>), TaskVectorError> {
        let site = |part| Site::layer(layer, part);
        let hidden = match self.seen(Seen::Units(site(Part::MlpDown))) {
            Some((a, b)) => self.units(&a, &b)?,
            None => {
                let gate = self.support(site(Part::MlpGate), Part::MlpNorm, stream)?;
                let up = self.support(site(Part::MlpUp), Part::MlpNorm, stream)?;
                self.units(&beside(&[gate.0, up.0]), &beside(&[gate.1, up.1]))?
            }
        };
        self.vector(site(Part::MlpNorm), stream)?;
        self.linear(site(Part::MlpGate), stream, &hidden)?;
        self.linear(site(Part::MlpUp), stream, &hidden)?;
        let branch = self.branch(site(Part::MlpSublayer), site(Part::MlpDown), &hidden)?;
        let output = branch.as_ref().unwrap_or(stream);
        self.linear(site(Part::MlpDown), &hidden, output)?;
        self.vector(site(Part::MlpPostNorm), output)?;
        Ok((hidden, branch))
    }
}
