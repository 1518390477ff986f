//! Preallocated keys and values of past tokens, layer by layer.

use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use burn_flex::{Flex, FlexTensor};

use super::decode_block::{Past, Stored};

/// Keys and values of the tokens seen so far, one preallocated buffer per layer.
///
/// A layer's buffers are allocated by its first [`append`](Self::append): a layer that never attends holds nothing.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<Option<Layer>>,
    /// Of each buffer: `[batch, kv_heads, capacity, head_dim]`.
    shape: [usize; 4],
    /// What is kept, if not the dtype of what is appended.
    dtype: Option<FloatDType>,
    device: Device,
}

#[derive(Debug, Clone)]
struct Layer {
    keys: Tensor<4>,
    values: Tensor<4>,
    len: usize,
}

impl KvCache {
    /// An empty cache for up to `capacity` tokens; nothing is allocated yet. A layer will take two buffers of
    /// `[batch, kv_heads, capacity, head_dim]`.
    pub fn new(
        layers: usize,
        batch: usize,
        kv_heads: usize,
        capacity: usize,
        head_dim: usize,
        device: &Device,
    ) -> Self {
        Self {
            layers: (0..layers).map(|_| None).collect(),
            shape: [batch, kv_heads, capacity, head_dim],
            dtype: None,
            device: device.clone(),
        }
    }

    /// The same cache, still empty, that keeps keys and values as f16: half the memory to hold and to read, and 11 bits of each value.
    ///
    /// # Panics
    /// If a layer holds a buffer.
    pub fn in_f16(self) -> Self {
        assert_eq!(self.bytes(), 0, "KvCache: a layer holds values of another dtype");
        Self { dtype: Some(FloatDType::F16), ..self }
    }

    /// Writes `k` and `v` after the tokens already held and returns all keys and values held, `[batch, kv_heads, len, head_dim]`, in
    /// the dtype of `k`.
    ///
    /// The write is in place as long as the caller has dropped the tensors returned before (otherwise the device copies).
    ///
    /// - k, v: `[batch, kv_heads, tokens, head_dim]`
    ///
    /// # Panics
    /// If `layer` is out of range, a shape disagrees or the tokens exceed the capacity (see [`remaining`](Self::remaining)).
    pub fn append(&mut self, layer: usize, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [batch, kv_heads, capacity, head_dim] = self.shape;
        let tokens = k.dims()[2];
        assert_eq!(k.dims(), [batch, kv_heads, tokens, head_dim], "KvCache: shape of k");
        assert_eq!(v.dims(), k.dims(), "KvCache: shape of v");
        let len = self.len(layer) + tokens;
        assert!(len <= capacity, "KvCache: {len} tokens in layer {layer} exceed the capacity of {capacity}");
        // Taken out of the vector: a second handle would turn the in-place write into a copy of the buffer.
        let given: FloatDType = k.dtype().into();
        let kept = self.dtype.unwrap_or(given);
        let empty = || Tensor::zeros(self.shape, (&self.device, kept.into()));
        let held =
            self.layers[layer].take().unwrap_or_else(|| Layer { keys: empty(), values: empty(), len: 0 });
        let write = [0..batch, 0..kv_heads, held.len..len, 0..head_dim];
        let keys = held.keys.slice_assign(write.clone(), k.cast(kept));
        let values = held.values.slice_assign(write, v.cast(kept));
        let filled = |x: &Tensor<4>| x.clone().narrow(2, 0, len).cast(given);
        let filled = (filled(&keys), filled(&values));
        self.layers[layer] = Some(Layer { keys, values, len });
        filled
    }

    /// Has `f` put the key and value of one more token behind those of a layer; `None`, and nothing done, where the layer holds nothing
    /// or is full, there are several sequences, or its values are not f32 or f16 on the CPU.
    pub(super) fn on_cpu<R>(&mut self, layer: usize, f: impl FnOnce(Past<'_>) -> R) -> Option<R> {
        let [batch, kv_heads, capacity, _] = self.shape;
        let fits = |held: &Layer| batch == 1 && held.len > 0 && held.len < capacity;
        self.layers[layer].as_ref().filter(|held| fits(held))?;
        // Taken out of the vector, as in `append`.
        let Layer { keys, values, len } = self.layers[layer].take()?;
        let flex = |x: &Tensor<4>| x.clone().try_into_primitive::<Flex>().ok();
        let (Some(mut k), Some(mut v)) = (flex(&keys), flex(&values)) else {
            self.layers[layer] = Some(Layer { keys, values, len });
            return None;
        };
        drop((keys, values));
        let whole = |x: &FlexTensor| x.is_contiguous() && x.layout().start_offset() == 0;
        let slices = if whole(&k) && whole(&v) { stored(&mut k).zip(stored(&mut v)) } else { None };
        let done = slices.map(|(keys, values)| f(Past { keys, values, kv_heads, len }));
        let [keys, values] = [k, v].map(Tensor::from_primitive::<Flex>);
        self.layers[layer] = Some(Layer { keys, values, len: len + usize::from(done.is_some()) });
        done
    }

    /// A cache of its own whose sequence `i` holds what sequence `sequences[i]` of this one holds, with room for `capacity`
    /// tokens: one context goes on in several ways without being computed again.
    ///
    /// # Panics
    /// If there is no such sequence, or a layer holds more than `capacity` tokens.
    pub fn select(&self, sequences: &[usize], capacity: usize) -> KvCache {
        let [batch, kv_heads, _, head_dim] = self.shape;
        assert!(
            sequences.iter().all(|&i| i < batch),
            "KvCache: sequences {sequences:?} of a batch of {batch}"
        );
        let shape = [sequences.len(), kv_heads, capacity, head_dim];
        let ids: Vec<i32> = sequences.iter().map(|&i| i as i32).collect();
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [sequences.len()]), &self.device);
        let copy = |held: &Layer| {
            assert!(held.len <= capacity, "KvCache: {} tokens exceed the capacity of {capacity}", held.len);
            let rows = [0..sequences.len(), 0..kv_heads, 0..held.len, 0..head_dim];
            let buffer = |from: &Tensor<4>| {
                let filled = from.clone().narrow(2, 0, held.len).select(0, ids.clone());
                Tensor::zeros(shape, (&self.device, from.dtype())).slice_assign(rows.clone(), filled)
            };
            Layer { keys: buffer(&held.keys), values: buffer(&held.values), len: held.len }
        };
        let layers = self.layers.iter().map(|layer| layer.as_ref().filter(|l| l.len > 0).map(copy)).collect();
        KvCache { layers, shape, dtype: self.dtype, device: self.device.clone() }
    }

    /// Forgets all tokens; the buffers stay for the next sequence.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Forgets the tokens from position `len` on; the buffers stay.
    pub fn truncate(&mut self, len: usize) {
        self.layers.iter_mut().flatten().for_each(|held| held.len = held.len.min(len));
    }

    /// Tokens held by a layer.
    ///
    /// # Panics
    /// If `layer` is out of range.
    pub fn len(&self, layer: usize) -> usize {
        self.layers[layer].as_ref().map_or(0, |held| held.len)
    }

    /// Whether a layer holds no token.
    ///
    /// # Panics
    /// If `layer` is out of range.
    pub fn is_empty(&self, layer: usize) -> bool {
        self.len(layer) == 0
    }

    /// Tokens a layer can still take.
    ///
    /// # Panics
    /// If `layer` is out of range.
    pub fn remaining(&self, layer: usize) -> usize {
        self.shape[2] - self.len(layer)
    }

    /// Bytes allocated over all layers: keys and values of those that hold a buffer.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor<4>| t.shape().num_elements() * t.dtype().size();
        self.layers.iter().flatten().map(|held| size(&held.keys) + size(&held.values)).sum()
    }
}

/// The values of a buffer that nobody else holds.
fn stored(x: &mut FlexTensor) -> Option<Stored<'_>> {
    match x.dtype() {
        DType::F32 => x.try_storage_mut().map(Stored::F32),
        DType::F16 => x.try_storage_mut().map(Stored::F16),
        _ => None,
    }
}
