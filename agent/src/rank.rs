//! Percentiles, by one definition everywhere: nearest rank.

/// The smallest of `sorted` (ascending) that at least `percent` in a hundred of all are not above; none of an empty
/// series.
#[must_use]
pub fn nearest<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank.min(sorted.len()).checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let series: Vec<u32> = (1..=200).collect();
        let of = |percent| nearest(&series, percent);
        assert_eq!(
            [0, 1, 50, 99, 100].map(of),
            [Some(1), Some(2), Some(100), Some(198), Some(200)]
        );
        assert_eq!(nearest(&[7], 99), Some(7));
        assert_eq!(nearest::<u8>(&[], 50), None);
    }
}
