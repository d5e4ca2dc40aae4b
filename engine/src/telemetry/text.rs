//! The text of the metrics, in the two forms that scrapers ask for, and read back into samples.
//!
//! The encoder speaks OpenMetrics; the classic Prometheus form is made from it, line by line. Quantiles are summaries in
//! both, a type the encoder does not know.
//!
//! Invariants: both forms have the same samples in the same order.
//!
//! It refuses to know what any metric means.

use std::fmt::Write as _;

/// What the names of metrics that hold quantiles end with; a scraper is told that they are summaries.
const QUANTILES_SUFFIX: &str = "_quantile_seconds";

/// A form of the metrics' text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextFormat {
    /// Prometheus text format 0.0.4.
    Classic,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl TextFormat {
    /// The form that a client asks for in its `Accept` header: OpenMetrics only where it is named, and not refused with
    /// `q=0`.
    pub fn accepted(accept: &str) -> Self {
        let named = accept.split(',').any(|range| {
            let mut parts = range.split(';').map(str::trim);
            let is_open = parts.next().is_some_and(|form| form.eq_ignore_ascii_case("application/openmetrics-text"));
            let quality = parts.filter_map(|part| part.strip_prefix("q=")).find_map(|q| q.parse::<f64>().ok());
            is_open && quality.is_none_or(|quality| quality > 0.0)
        });
        if named { Self::OpenMetrics } else { Self::Classic }
    }

    /// The media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The text in this form, from what the encoder wrote.
    pub(super) fn finish(self, encoded: &str) -> String {
        let mut text = String::with_capacity(encoded.len());
        let mut help = "";
        for line in encoded.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                help = rest.split_once(' ').map_or("", |(_, help)| help);
            } else if let Some((family, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                let kind = if family.ends_with(QUANTILES_SUFFIX) { "summary" } else { kind };
                let (suffix, kind) = match (self, kind) {
                    (Self::Classic, "counter") => ("_total", kind),
                    (Self::Classic, "info") => ("_info", "gauge"),
                    (Self::Classic, "unknown") => ("", "untyped"),
                    _ => ("", kind),
                };
                // Writing into a string cannot fail.
                let _ = writeln!(text, "# HELP {family}{suffix} {help}\n# TYPE {family}{suffix} {kind}");
            } else if self == Self::OpenMetrics || !line.starts_with('#') {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }
}

/// One value of one metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Its full name.
    pub name: String,
    /// Its labels, in the order of the text.
    pub labels: Vec<(String, String)>,
    /// Its value.
    pub value: f64,
}

/// The samples of a text in either form. Lines that are none are passed over.
pub fn samples(text: &str) -> impl Iterator<Item = Sample> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample)
}

fn sample(line: &str) -> Option<Sample> {
    let name_end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(name_end);
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    let value = value.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Labels up to the closing brace, and what is behind it.
fn labels(mut rest: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        if let Some(behind) = rest.strip_prefix('}') {
            return Some((labels, behind));
        }
        let (name, behind) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = behind.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        rest = behind.get(end + 1..)?;
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENCODED: &str = "\
# HELP b_tasks Tasks.
# TYPE b_tasks counter
b_tasks_total{model=\"a\\\"b\\\\\",kind=\"x,y}\"} 3
# HELP b_build The program.
# TYPE b_build info
b_build_info{version=\"1\"} 1
# HELP b_l_quantile_seconds Q.
# TYPE b_l_quantile_seconds gauge
b_l_quantile_seconds{quantile=\"0.5\"} 0.25
# EOF
";

    #[test]
    fn the_classic_form_names_families_as_their_samples() {
        let text = TextFormat::Classic.finish(ENCODED);
        assert!(text.contains("# TYPE b_tasks_total counter\nb_tasks_total{"), "{text}");
        assert!(text.contains("# HELP b_build_info The program.\n# TYPE b_build_info gauge\n"), "{text}");
        assert!(text.contains("# TYPE b_l_quantile_seconds summary\n"), "{text}");
        assert!(!text.contains("EOF"), "{text}");
        let open = TextFormat::OpenMetrics.finish(ENCODED);
        assert!(open.contains("# TYPE b_tasks counter\n") && open.ends_with("# EOF\n"), "{open}");
        assert!(samples(&text).eq(samples(&open)));
    }

    #[test]
    fn samples_are_read_back_with_whatever_their_labels_hold() {
        let first = samples(ENCODED).next().unwrap();
        let labels = [("model", "a\"b\\"), ("kind", "x,y}")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!((first.name.as_str(), first.value, first.labels), ("b_tasks_total", 3.0, labels.to_vec()));
        for broken in ["b{", "b{a=\"", "b{a=\"x\"", "b{a} 1", "b x", "b", ""] {
            assert_eq!(samples(broken).count(), 0, "{broken:?}");
        }
    }

    #[test]
    fn open_metrics_only_for_those_who_ask_for_it() {
        for accept in ["", "*/*", "text/plain", "application/openmetrics-text;q=0, text/plain"] {
            assert_eq!(TextFormat::accepted(accept), TextFormat::Classic, "{accept}");
        }
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
        assert_eq!(TextFormat::accepted(prometheus), TextFormat::OpenMetrics);
    }
}
