//! Worked arithmetic, and the seeded generator that draws and shuffles.

use std::collections::HashSet;

use super::text::pack;

/// Documents of worked problems of the first `kinds` kinds, none of them in `seen`, `bytes` in all.
pub fn arithmetic(rng: &mut Rng, kinds: u64, bytes: usize, seen: &mut HashSet<String>) -> Vec<String> {
    let (mut blocks, mut total) = (Vec::new(), 0);
    while total < bytes {
        let (problem, steps, answer) = problem(rng, kinds);
        if seen.insert(problem.clone()) {
            let block = format!("Problem: {problem}\n{}\nAnswer: {answer}", steps.join("\n"));
            total += block.len() + 1;
            blocks.push(block);
        }
    }
    pack(None, &blocks, 1_200)
}

const PLACES: [&str; 6] = ["ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands"];

fn problem(rng: &mut Rng, kinds: u64) -> (String, Vec<String>, String) {
    match rng.below(kinds) {
        0 => {
            let (a, b) = (rng.digits(2, 4), rng.digits(2, 4));
            (format!("{a} + {b}"), add_steps(a, b), (a + b).to_string())
        }
        1 => {
            let (x, y) = (rng.digits(2, 4), rng.digits(2, 4));
            let (a, b) = (x.max(y), x.min(y));
            (format!("{a} - {b}"), subtract_steps(a, b), (a - b).to_string())
        }
        2 => {
            let (a, b) = (rng.digits(2, 4), 2 + rng.below(8));
            (format!("{a} * {b}"), product_steps(b, a), (a * b).to_string())
        }
        3 => {
            let (a, b) = (rng.digits(2, 3), rng.digits(2, 2));
            (format!("{a} * {b}"), product_steps(a, b), (a * b).to_string())
        }
        4 => {
            let (a, b) = (rng.digits(3, 5), 2 + rng.below(11));
            let (mut rest, mut steps) = (0, Vec::new());
            for digit in a.to_string().bytes().map(|d| u64::from(d - b'0')) {
                let now = rest * 10 + digit;
                steps.push(format!("bring down {digit}: {now} / {b} = {} remainder {}", now / b, now % b));
                rest = now % b;
            }
            (format!("{a} / {b}"), steps, format!("{} remainder {}", a / b, a % b))
        }
        5 => {
            let scale = 1 + rng.below(12);
            let (a, b) = (scale * rng.between(12, 90), scale * rng.between(5, 60));
            (format!("gcd({a}, {b})"), gcd_steps(a, b), gcd(a, b).to_string())
        }
        6 => {
            let (b, d) = (rng.between(2, 12), rng.between(2, 12));
            let (a, c) = (rng.between(1, b - 1), rng.between(1, d - 1));
            let common = b / gcd(b, d) * d;
            let (left, right) = (a * (common / b), c * (common / d));
            let (sum, factor) = (left + right, gcd(left + right, common));
            let steps = vec![
                format!("common denominator of {b} and {d}: {common}"),
                format!("{a}/{b} = {left}/{common}"),
                format!("{c}/{d} = {right}/{common}"),
                format!("{left}/{common} + {right}/{common} = {sum}/{common}"),
                format!("divide both by {factor}: {}/{}", sum / factor, common / factor),
            ];
            (format!("{a}/{b} + {c}/{d}"), steps, format!("{}/{}", sum / factor, common / factor))
        }
        7 => {
            let (a, x, b) = (rng.between(2, 12), rng.between(1, 40), rng.between(1, 99));
            let total = a * x + b;
            let steps = vec![
                format!("subtract {b} from both sides: {a} * x = {total} - {b} = {}", a * x),
                format!("divide both sides by {a}: x = {} / {a} = {x}", a * x),
            ];
            (format!("solve {a} * x + {b} = {total}"), steps, format!("x = {x}"))
        }
        8 => {
            let (percent, whole) = (5 * rng.between(1, 19), 20 * rng.between(2, 150));
            let product = percent * whole;
            let steps = vec![
                format!("{percent}% = {percent}/100"),
                format!("{percent} * {whole} = {product}"),
                format!("{product} / 100 = {}", product / 100),
            ];
            (format!("{percent}% of {whole}"), steps, (product / 100).to_string())
        }
        9 => {
            let (a, b, c) = (rng.between(2, 60), rng.between(2, 60), rng.between(2, 12));
            let product = (a + b) * c;
            let d = rng.between(1, product - 1);
            let steps = vec![
                format!("brackets first: {a} + {b} = {}", a + b),
                format!("{} * {c} = {product}", a + b),
                format!("{product} - {d} = {}", product - d),
            ];
            (format!("({a} + {b}) * {c} - {d}"), steps, (product - d).to_string())
        }
        _ => word_problem(rng),
    }
}

fn word_problem(rng: &mut Rng) -> (String, Vec<String>, String) {
    let who = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry"][rng.below(8) as usize];
    let what = ["apples", "books", "coins", "pencils", "stamps", "marbles"][rng.below(6) as usize];
    let place = ["boxes", "bags", "drawers", "baskets"][rng.below(4) as usize];
    let (boxes, each) = (rng.between(3, 24), rng.between(4, 48));
    let total = boxes * each;
    let gone = rng.between(1, total - 1);
    let problem = format!(
        "{who} has {boxes} {place} with {each} {what} in each and gives away {gone}. How many {what} are left?"
    );
    let steps = vec![
        format!("in the {place}: {boxes} * {each} = {total}"),
        format!("after giving away: {total} - {gone} = {}", total - gone),
    ];
    (problem, steps, format!("{} {what}", total - gone))
}

fn add_steps(a: u64, b: u64) -> Vec<String> {
    let (mut x, mut y, mut carry, mut steps) = (a, b, 0, Vec::new());
    for place in PLACES {
        if x == 0 && y == 0 {
            break;
        }
        let sum = x % 10 + y % 10 + carry;
        let carried = if carry > 0 { " + 1" } else { "" };
        let next = if sum > 9 { ", carry 1" } else { "" };
        steps.push(format!("{place}: {} + {}{carried} = {sum}, write {}{next}", x % 10, y % 10, sum % 10));
        (x, y, carry) = (x / 10, y / 10, sum / 10);
    }
    if carry > 0 {
        steps.push("write the last carry 1".to_owned());
    }
    steps
}

fn subtract_steps(a: u64, b: u64) -> Vec<String> {
    let (mut x, mut y, mut borrow, mut steps) = (a, b, 0, Vec::new());
    for place in PLACES {
        if x == 0 && y == 0 {
            break;
        }
        let taken = if borrow > 0 { " - 1" } else { "" };
        let (top, bottom) = (x % 10, y % 10 + borrow);
        if top < bottom {
            let result = top + 10 - bottom;
            steps.push(format!("{place}: borrow 10, {}{taken} - {} = {result}", top + 10, y % 10));
        } else {
            steps.push(format!("{place}: {top}{taken} - {} = {}", y % 10, top - bottom));
        }
        (x, y, borrow) = (x / 10, y / 10, u64::from(top < bottom));
    }
    steps
}

/// Partial products of `a` with each digit of `b`, then their running sum.
fn product_steps(a: u64, b: u64) -> Vec<String> {
    let (mut parts, mut unit, mut rest) = (Vec::new(), 1, b);
    while rest > 0 {
        if rest % 10 > 0 {
            parts.push(rest % 10 * unit);
        }
        (unit, rest) = (unit * 10, rest / 10);
    }
    let mut steps: Vec<String> = parts.iter().map(|p| format!("{a} * {p} = {}", a * p)).collect();
    let mut sum = a * parts.first().copied().unwrap_or(0);
    for part in parts.iter().skip(1) {
        steps.push(format!("{sum} + {} = {}", a * part, sum + a * part));
        sum += a * part;
    }
    steps
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn gcd_steps(mut a: u64, mut b: u64) -> Vec<String> {
    let mut steps = Vec::new();
    while b > 0 {
        steps.push(format!("{a} = {} * {b} + {}", a / b, a % b));
        (a, b) = (b, a % b);
    }
    steps
}

/// The splitmix64 generator (Steele, Lea and Flood 2014), seeded by the FNV-1a hash of a name.
pub struct Rng(u64);

impl Rng {
    pub fn new(name: &str) -> Self {
        Self(
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)),
        )
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`, up to a bias below `n / 2^64`.
    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// A number of `low` to `high` digits, each count of digits equally likely.
    fn digits(&mut self, low: u32, high: u32) -> u64 {
        let count = low + self.below(u64::from(high - low + 1)) as u32;
        self.between(10_u64.pow(count - 1), 10_u64.pow(count) - 1)
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Value of `+ - * /` over integers and brackets, an own parser beside the generator.
    fn value(text: &str) -> f64 {
        fn atom(s: &mut &str) -> f64 {
            *s = s.trim_start();
            if let Some(inner) = s.strip_prefix('(') {
                *s = inner;
                let v = sum(s);
                *s = s.trim_start().strip_prefix(')').expect("closing bracket");
                return v;
            }
            let end = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
            let v = s[..end].parse().expect("number");
            *s = &s[end..];
            v
        }
        fn term(s: &mut &str) -> f64 {
            let mut v = atom(s);
            loop {
                *s = s.trim_start();
                match s.chars().next() {
                    Some('*') => (*s = &s[1..], v *= atom(s)).1,
                    Some('/') => (*s = &s[1..], v /= atom(s)).1,
                    _ => return v,
                }
            }
        }
        fn sum(s: &mut &str) -> f64 {
            let mut v = term(s);
            loop {
                *s = s.trim_start();
                match s.chars().next() {
                    Some('+') => (*s = &s[1..], v += term(s)).1,
                    Some('-') => (*s = &s[1..], v -= term(s)).1,
                    _ => return v,
                }
            }
        }
        let mut rest = text;
        let v = sum(&mut rest);
        assert!(rest.trim().is_empty(), "{text}: {rest} is left");
        v
    }

    fn formula(text: &str) -> bool {
        text.bytes().all(|b| b"0123456789+-*/() ".contains(&b)) && text.bytes().any(|b| b.is_ascii_digit())
    }

    /// Whether every `left = right` of plain numbers in the line holds.
    fn holds(line: &str) -> bool {
        let line = line.rsplit(": ").next().unwrap_or(line).split(", ").next().unwrap_or(line);
        let sides: Vec<f64> = line.split(" = ").filter(|s| formula(s)).map(value).collect();
        sides.windows(2).all(|w| (w[0] - w[1]).abs() < 1e-9)
    }

    #[test]
    fn steps_and_answers_hold() {
        let docs = arithmetic(&mut Rng::new("test"), 11, 200_000, &mut HashSet::new());
        let (mut lines, mut answers) = (0, 0);
        for block in docs.iter().flat_map(|d| d.split("Problem: ")).filter(|b| !b.is_empty()) {
            let problem = block.lines().next().expect("problem");
            for line in block.lines().skip(1).filter(|l| l.contains(" = ") && !l.contains(['x', '%'])) {
                assert!(holds(line.split(", write").next().expect("step")), "{line}");
                lines += 1;
            }
            let answer = block.lines().last().and_then(|l| l.strip_prefix("Answer: ")).expect("answer");
            if formula(problem) && formula(answer) {
                assert!((value(problem) - value(answer)).abs() < 1e-9, "{problem}: {answer}");
                answers += 1;
            } else if let Some((quotient, rest)) = answer.split_once(" remainder ") {
                let (a, b) = problem.split_once(" / ").expect("division");
                assert_eq!(value(a), value(quotient) * value(b) + value(rest), "{problem}");
            } else if let Some((whole, x)) = problem.strip_prefix("solve ").zip(answer.strip_prefix("x = ")) {
                assert!(holds(&whole.replace('x', x)), "{problem}: {answer}");
            }
        }
        assert!(lines > 3_000 && answers > 500, "{lines} lines, {answers} answers");
        assert!(!holds("tens: 3 + 4 = 8") && !holds("19 + 1 = 21"));
    }

    #[test]
    fn problems_never_repeat() {
        let mut seen = HashSet::new();
        let first = arithmetic(&mut Rng::new("a"), 11, 50_000, &mut seen).join("\n");
        let second = arithmetic(&mut Rng::new("b"), 3, 50_000, &mut seen).join("\n");
        let problems =
            |t: &str| t.lines().filter(|l| l.starts_with("Problem: ")).map(str::to_owned).collect::<Vec<_>>();
        let known: HashSet<String> = problems(&first).into_iter().collect();
        assert_eq!(known.len(), problems(&first).len());
        assert!(problems(&second).iter().all(|p| !known.contains(p)));
        // The same name gives the same text, another name another one.
        let again = |name| arithmetic(&mut Rng::new(name), 11, 50_000, &mut HashSet::new()).join("\n");
        assert_eq!(again("a"), first);
        assert_ne!(again("c"), first);
    }
}
