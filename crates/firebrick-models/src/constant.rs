//! Values that are no part of a graph, on the device of one.

use burn::tensor::{Device, Tensor};

/// The values of `t` `[..]` as a constant on `device`, with the autodiff association and checkpointing that `device` has.
pub fn constant_on<const D: usize>(t: Tensor<D>, device: &Device) -> Tensor<D> {
    let t = t.without_autodiff().to_device(&device.clone().inner());
    match device.gradient_checkpointing_strategy() {
        Some(strategy) => t.autodiff().with_gradient_checkpointing_strategy(strategy),
        None => t,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_belong_to_the_device_and_to_no_graph() {
        let plain = Device::flex();
        let x = Tensor::<1>::from_floats([1.0, 2.0], &plain.clone().autodiff()).require_grad();
        let constant = constant_on(x.clone(), &plain);
        assert!(!constant.is_require_grad() && constant.device().gradient_checkpointing_strategy().is_none());
        let y = Tensor::<1>::from_floats([3.0, 4.0], &plain.clone().autodiff()).require_grad();
        let loss = (constant_on(x.clone(), &y.device()) * y.clone() + x.clone()).sum();
        let gradients = loss.backward();
        let of = |t: &Tensor<1>| t.grad(&gradients).unwrap().into_data().iter::<f32>().collect::<Vec<_>>();
        assert_eq!((of(&y), of(&x)), (vec![1.0, 2.0], vec![1.0, 1.0]), "x counts where it is no constant");
    }
}
