//! "Did you mean": the nearest of the words that would have been right.

/// Words longer than this are not compared: no word of the catalogue is.
const WORD_CHARS_MAX: usize = 64;

/// The candidate nearest to `word`, if one is near enough to be meant. Ties go to the first.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = normal(word)?;
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let Some(other) = normal(candidate) else { continue };
        let distance = distance(&word, &other);
        let near = distance <= word.len().max(other.len()) / 3 || is_part(&word, &other);
        if near && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// Lower case, hyphens as underscores: differences that nobody means. `None` when too long.
fn normal(word: &str) -> Option<Vec<char>> {
    let word: Vec<char> =
        word.chars().take(WORD_CHARS_MAX + 1).map(|c| if c == '-' { '_' } else { c.to_ascii_lowercase() }).collect();
    (word.len() <= WORD_CHARS_MAX).then_some(word)
}

/// Whether one is the other with words before or after it: `bind` and `bind_address`.
fn is_part(a: &[char], b: &[char]) -> bool {
    let (short, long) = if a.len() < b.len() { (a, b) } else { (b, a) };
    let rest = long.len() - short.len();
    short.len() >= 4
        && ((long.starts_with(short) && long.get(short.len()) == Some(&'_'))
            || (long.ends_with(short) && rest > 0 && long.get(rest - 1) == Some(&'_')))
}

/// Insertions, deletions, substitutions and swaps of neighbours between two words (optimal string alignment).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut cost = (last[j + 1] + 1).min(row[j] + 1).min(last[j] + usize::from(x != y));
            let swapped = i > 0 && j > 0 && a[i - 1] == *y && b[j - 1] == *x;
            if swapped {
                cost = cost.min(before_last[j - 1] + 1);
            }
            row.push(cost);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_found_and_far_ones_are_not() {
        let keys = ["bind_address", "max_request_size_mb", "capacity", "capacity_bytes"];
        assert_eq!(nearest("capactiy", keys), Some("capacity"));
        assert_eq!(nearest("capacity-bytes", keys), Some("capacity_bytes"));
        assert_eq!(nearest("bind_adress", keys), Some("bind_address"));
        assert_eq!(nearest("bind", keys), Some("bind_address"));
        assert_eq!(nearest("max_request_size", keys), Some("max_request_size_mb"));
        assert_eq!(nearest("colour", keys), None);
        assert_eq!(nearest("", keys), None);
        assert_eq!(nearest(&"x".repeat(10_000), keys), None);
    }

    #[test]
    fn distances_are_those_of_the_definition() {
        let d = |a: &str, b: &str| distance(&a.chars().collect::<Vec<_>>(), &b.chars().collect::<Vec<_>>());
        assert_eq!(d("", "abc"), 3);
        assert_eq!(d("kitten", "sitting"), 3);
        assert_eq!(d("ab", "ba"), 1);
        assert_eq!(d("same", "same"), 0);
    }
}
