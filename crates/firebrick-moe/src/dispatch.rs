//! From chosen experts to rows sorted by expert, and back (MegaBlocks, arXiv 2211.15841, without its blocks).

/// Where each slot (a token's use of one expert) goes when slots are sorted by expert.
///
/// Built on the host from the chosen experts, which is one read from the device per layer and pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DispatchPlan {
    order: Vec<usize>,
    offsets: Vec<usize>,
}

impl DispatchPlan {
    /// The plan for `slots`, the expert of every slot; with `k` experts per token, slot `token * k + choice`.
    ///
    /// A stable counting sort: slots of an expert stay in order.
    ///
    /// # Panics
    /// If a slot's expert is not below `experts`.
    pub fn new(slots: &[usize], experts: usize) -> Self {
        let mut offsets = vec![0; experts + 1];
        for &expert in slots {
            assert!(expert < experts, "a slot of expert {expert}, of {experts}");
            offsets[expert + 1] += 1;
        }
        for e in 0..experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let mut order = vec![0; slots.len()];
        for (slot, &expert) in slots.iter().enumerate() {
            order[next[expert]] = slot;
            next[expert] += 1;
        }
        DispatchPlan { order, offsets }
    }

    /// The slot of each sorted row.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// The rows of expert `e` are `offsets[e]..offsets[e + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// How many slots each expert has.
    pub fn counts(&self) -> Vec<usize> {
        self.offsets.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firebrick_core::Seed;

    #[test]
    fn a_small_plan_by_hand() {
        let plan = DispatchPlan::new(&[2, 0, 2, 1, 0, 2], 4);
        assert_eq!(plan.order(), [1, 4, 3, 0, 2, 5]);
        assert_eq!(plan.offsets(), [0, 2, 3, 6, 6]);
        assert_eq!(plan.counts(), [2, 1, 3, 0]);
        let empty = DispatchPlan::new(&[], 2);
        assert_eq!((empty.offsets(), empty.counts()), (&[0, 0, 0][..], vec![0, 0]));
    }

    #[test]
    fn every_plan_is_a_stable_sort() {
        for (seed, experts, n) in [(0, 1, 7), (1, 3, 1), (2, 8, 300), (3, 64, 40)] {
            let draws = Seed(seed).uniform("slots", n, 1.0);
            let slots: Vec<usize> = draws
                .iter()
                .map(|u| (((u + 1.0) / 2.0 * experts as f32) as usize).min(experts - 1))
                .collect();
            let plan = DispatchPlan::new(&slots, experts);
            assert_eq!((plan.offsets()[0], plan.offsets()[experts]), (0, n));
            assert_eq!(plan.counts().iter().sum::<usize>(), n);
            let mut every = plan.order().to_vec();
            every.sort_unstable();
            assert_eq!(every, (0..n).collect::<Vec<_>>());
            for e in 0..experts {
                let rows = &plan.order()[plan.offsets()[e]..plan.offsets()[e + 1]];
                assert!(rows.iter().all(|&slot| slots[slot] == e));
                assert!(rows.is_sorted(), "stable");
            }
        }
    }

    #[test]
    #[should_panic(expected = "expert 2, of 2")]
    fn an_expert_out_of_range_is_refused() {
        DispatchPlan::new(&[0, 2], 2);
    }
}
