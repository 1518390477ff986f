//! Trainable parameters of a module by path, as flat tensors.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Tensor};

/// A trainable parameter.
pub(crate) struct Trainable {
    /// Its path in the module, such as `layers.0.q.weight`.
    pub path: String,
    /// Its identity in this process.
    pub id: ParamId,
    /// Extents.
    pub dims: Vec<usize>,
    /// Its elements in row-major order, outside autodiff.
    pub values: Tensor<1>,
    /// The device of the parameter, with its autodiff association.
    pub device: Device,
}

/// The trainable parameters of `module`, in module order.
pub(crate) fn trainable<M: Module>(module: &M) -> Vec<Trainable> {
    struct Collect {
        path: Path,
        found: Vec<Trainable>,
    }
    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, _kind: &str) {
            self.path.enter(name);
        }
        fn exit_module(&mut self, _name: &str, _kind: &str) {
            self.path.exit();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if !param.is_require_grad() {
                return;
            }
            let value = param.base();
            self.found.push(Trainable {
                path: self.path.to_string(),
                id: param.id,
                dims: value.dims().to_vec(),
                device: value.device(),
                values: flat(value.inner()),
            });
        }
    }
    let mut collect = Collect { path: Path::default(), found: Vec::new() };
    module.visit(&mut collect);
    collect.found
}

/// Replaces every trainable parameter by what `change` makes of its path and its flat values, on its device.
pub(crate) fn map_trainable<M: Module>(module: M, change: &mut dyn FnMut(&str, Tensor<1>) -> Tensor<1>) -> M {
    struct Change<'a> {
        path: Path,
        change: &'a mut dyn FnMut(&str, Tensor<1>) -> Tensor<1>,
    }
    impl ModuleMapper for Change<'_> {
        fn enter_module(&mut self, name: &str, _kind: &str) {
            self.path.enter(name);
        }
        fn exit_module(&mut self, _name: &str, _kind: &str) {
            self.path.exit();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !param.is_require_grad() {
                return param;
            }
            let path = self.path.to_string();
            map_values(param, |_, values| (self.change)(&path, values))
        }
    }
    module.map(&mut Change { path: Path::default(), change })
}

/// Replaces the value of `param` by what `change` makes of its flat values, outside autodiff; identity, training state
/// and checkpointing strategy stay.
pub(crate) fn map_values<const D: usize>(
    param: Param<Tensor<D>>,
    change: impl FnOnce(ParamId, Tensor<1>) -> Tensor<1>,
) -> Param<Tensor<D>> {
    let (id, value, mapper) = param.consume();
    let (dims, require_grad) = (value.dims(), value.is_require_grad());
    let strategy = value.gradient_checkpointing_strategy();
    let mut value: Tensor<D> = change(id, flat(value.inner())).reshape(dims);
    if let Some(strategy) = strategy {
        value = value.autodiff().with_gradient_checkpointing_strategy(strategy);
    }
    Param::from_mapped_value(id, value.set_require_grad(require_grad), mapper)
}

/// `tensor` as one row of its elements in row-major order.
pub(crate) fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let n = tensor.shape().num_elements();
    tensor.reshape([n])
}

/// Elements added up in one piece: burn-flex adds up longer tensors in an order that depends on its threads.
const PIECE: usize = 1 << 21;

/// The sum of all elements of `x` as `[1]`, in an order that their number alone sets: the same for any number of threads.
pub fn ordered_sum<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    sum_of(&flat(x), |piece| piece)
}

/// The sum of the squares of `x` as `[1]`, in an order that its length alone sets.
pub(crate) fn squares(x: &Tensor<1>) -> Tensor<1> {
    sum_of(x, |piece| piece.square())
}

fn sum_of(x: &Tensor<1>, f: impl Fn(Tensor<1>) -> Tensor<1>) -> Tensor<1> {
    let n = x.dims()[0];
    if n <= PIECE {
        return f(x.clone()).sum();
    }
    let piece = |at: usize| f(x.clone().narrow(0, at, PIECE.min(n - at))).sum();
    (0..n).step_by(PIECE).map(piece).reduce(|a, b| a + b).expect("at least one piece")
}

/// The path of the parameter a visitor is at.
#[derive(Default)]
pub(crate) struct Path(Vec<String>);

impl Path {
    pub fn enter(&mut self, name: &str) {
        self.0.push(name.to_string());
    }

    pub fn exit(&mut self) {
        self.0.pop();
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join("."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;

    #[test]
    fn sums_do_not_depend_on_threads() {
        let values = Seed(1).normal("values", 2 * PIECE + 12_345, 1.0);
        let want: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
        let x = Tensor::<1>::from_floats(values.as_slice(), &Device::flex());
        let matrix = x.clone().square().reshape([1, values.len()]);
        let found = [1, 2, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                [squares(&x), ordered_sum::<2>(matrix.clone())].map(|sum| sum.into_scalar::<f32>())
            })
        });
        assert!(found.iter().flatten().all(|sum| *sum == found[0][0]), "{found:?}");
        assert!((f64::from(found[0][0]) / want - 1.0).abs() < 1e-4, "{found:?} instead of {want}");
    }
}
