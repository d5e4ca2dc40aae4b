//! Plots as SVG text, with colours by class so that the page can choose them for light and dark.
//!
//! Invariants: every text is escaped; a plot of nothing says that there is nothing.
//!
//! It refuses to know what is plotted.

use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;
/// Height of one bar and its gap.
const BAR: f64 = 24.0;
/// Room for the labels of bars.
const BAR_LEFT: f64 = 250.0;

/// How values become places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// Powers of ten.
    Log,
    /// Quantiles: each nine takes the same room.
    Nines,
}

/// One side of a plot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Axis {
    pub(crate) label: &'static str,
    pub(crate) scale: Scale,
}

/// A line through points, ascending in x.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
    pub(crate) is_dashed: bool,
}

/// A bar of parts, each a share of the whole width.
#[derive(Debug, Clone)]
pub(crate) struct Bar {
    pub(crate) label: String,
    /// In the order of the legend.
    pub(crate) parts: Vec<f64>,
    /// A mark at this share, and what the bar says at its end.
    pub(crate) mark: Option<f64>,
    pub(crate) note: String,
}

impl Line {
    pub(crate) fn new(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), points, is_dashed: false }
    }

    pub(crate) fn dashed(self) -> Self {
        Self { is_dashed: true, ..self }
    }
}

/// Lines in one plot.
pub(crate) fn lines(title: &str, x: Axis, y: Axis, lines: &[Line]) -> String {
    let finite = |line: &Line| -> Vec<(f64, f64)> {
        let places = line.points.iter().map(|(at, value)| (x.scale.place(*at), y.scale.place(*value)));
        places.filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let places: Vec<Vec<(f64, f64)>> = lines.iter().map(finite).collect();
    let all = || places.iter().flatten();
    if all().next().is_none() {
        return format!("<figure><figcaption>{}</figcaption><p>nothing was measured</p></figure>", escape(title));
    }
    let x_range = x.scale.range(all().map(|place| place.0));
    let y_range = y.scale.range(all().map(|place| place.1));
    let frame = Frame { x: x_range, y: y_range };
    let mut svg = open(title, HEIGHT);
    frame.axes(&mut svg, x, y);
    for (index, (line, places)) in lines.iter().zip(&places).enumerate() {
        let mut path = String::new();
        for (step, place) in places.iter().enumerate() {
            let _ =
                write!(path, "{}{:.1} {:.1}", if step == 0 { "M" } else { "L" }, frame.x(place.0), frame.y(place.1));
        }
        let dash = if line.is_dashed { " stroke-dasharray=\"5 4\"" } else { "" };
        let _ = write!(svg, "<path class=\"s{index}\" d=\"{path}\"{dash}/>");
        if let Some(only) = places.first().filter(|first| places.iter().all(|place| place == *first)) {
            let _ = write!(
                svg,
                "<circle class=\"d{index}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                frame.x(only.0),
                frame.y(only.1)
            );
        }
    }
    legend(&mut svg, lines.iter().map(|line| line.name.as_str()), 's');
    close(svg)
}

/// Bars under each other. `legend_names` name the parts.
pub(crate) fn bars(title: &str, legend_names: &[&str], bars: &[Bar]) -> String {
    if bars.is_empty() {
        return format!("<figure><figcaption>{}</figcaption><p>nothing was measured</p></figure>", escape(title));
    }
    let height = TOP + bars.len() as f64 * BAR + 8.0;
    let width = WIDTH - BAR_LEFT - 90.0;
    let mut svg = open(title, height);
    for (row, bar) in bars.iter().enumerate() {
        let top = TOP + row as f64 * BAR;
        let middle = top + BAR / 2.0;
        let _ = write!(
            svg,
            "<text class=\"label\" x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>\
             <rect class=\"room\" x=\"{BAR_LEFT}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\"/>",
            BAR_LEFT - 8.0,
            escape(&bar.label),
            top + 3.0,
            BAR - 6.0,
        );
        let mut left = BAR_LEFT;
        for (part, share) in bar.parts.iter().enumerate() {
            let long = share.clamp(0.0, 1.0) * width;
            let _ = write!(
                svg,
                "<rect class=\"b{part}\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{long:.1}\" height=\"{:.1}\"/>",
                top + 3.0,
                BAR - 6.0,
            );
            left += long;
        }
        if let Some(mark) = bar.mark {
            let at = BAR_LEFT + mark.clamp(0.0, 1.0) * width;
            let _ = write!(svg, "<path class=\"mark\" d=\"M{at:.1} {:.1}V{:.1}\"/>", top + 1.0, top + BAR - 1.0);
        }
        let _ = write!(svg, "<text x=\"{:.1}\" y=\"{middle:.1}\">{}</text>", BAR_LEFT + width + 8.0, escape(&bar.note));
    }
    legend(&mut svg, legend_names.iter().copied(), 'b');
    close(svg)
}

/// Text as HTML shows it.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// The place of a plot's values on the page.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn x(&self, place: f64) -> f64 {
        LEFT + (place - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, place: f64) -> f64 {
        HEIGHT - BOTTOM - (place - self.y.0) / (self.y.1 - self.y.0) * (HEIGHT - TOP - BOTTOM)
    }

    fn axes(&self, svg: &mut String, x: Axis, y: Axis) {
        let bottom = HEIGHT - BOTTOM;
        for (place, text) in y.scale.ticks(self.y) {
            let at = self.y(place);
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{:.1}\"/><text x=\"{:.1}\" y=\"{at:.1}\" text-anchor=\"end\">{text}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
            );
        }
        for (place, text) in x.scale.ticks(self.x) {
            let at = self.x(place);
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{at:.1} {TOP}V{bottom}\"/><text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                bottom + 14.0,
            );
        }
        let _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{LEFT} {TOP}V{bottom}H{:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            WIDTH - RIGHT,
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 10.0,
            escape(x.label),
            f64::midpoint(TOP, bottom),
            escape(y.label),
        );
    }
}

impl Scale {
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log => {
                if value > 0.0 {
                    value.log10()
                } else {
                    f64::NAN
                }
            }
            // The largest value has quantile one, which has no place; four nines are enough for the eye.
            Self::Nines => -(1.0 - value.clamp(0.0, 0.9999)).log10(),
        }
    }

    /// The range of an axis that shows all of these places.
    fn range(self, places: impl Iterator<Item = f64>) -> (f64, f64) {
        let (mut from, mut to) =
            places.fold((f64::MAX, f64::MIN), |(from, to), place| (from.min(place), to.max(place)));
        if self == Self::Log {
            let room = ((to - from) * 0.05).max(0.05);
            (from, to) = (from - room, to + room);
        } else {
            from = from.min(0.0);
            to += if self == Self::Linear { (to - from) * 0.04 } else { 0.0 };
        }
        if to - from > 1e-9 { (from, to) } else { (from, from + 1.0) }
    }

    fn ticks(self, (from, to): (f64, f64)) -> Vec<(f64, String)> {
        match self {
            Self::Nines => {
                [(0.0, "0 %"), (0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %")]
                    .iter()
                    .map(|(quantile, text)| (self.place(*quantile), (*text).to_owned()))
                    .filter(|(place, _)| *place <= to + 1e-9)
                    .collect()
            }
            Self::Log => {
                let digits: &[f64] = match to - from {
                    wide if wide > 2.0 => &[1.0],
                    middle if middle > 0.8 => &[1.0, 2.0, 5.0],
                    _ => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
                };
                let decades = from.floor() as i32..=to.ceil() as i32;
                let values = decades.flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade)));
                let ticks = values.map(|value| (value.log10(), short(value)));
                ticks.filter(|(place, _)| (from..=to).contains(place)).collect()
            }
            Self::Linear => {
                let step = nice((to - from) / 6.0);
                let first = (from / step).ceil() as i64;
                let last = (to / step).floor() as i64;
                (first..=last).map(|index| index as f64 * step).map(|value| (value, short(value))).collect()
            }
        }
    }
}

/// The smallest of 1, 2 and 5 times a power of ten that is not below `step`.
fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|digit| digit * power).find(|nice| *nice >= step * 0.999_999).unwrap_or(step)
}

/// A number in few characters.
fn short(value: f64) -> String {
    let (value, unit) = if value.abs() >= 1e6 {
        (value / 1e6, "M")
    } else if value.abs() >= 1e4 {
        (value / 1e3, "k")
    } else {
        (value, "")
    };
    let text = format!("{value:.3}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

fn open(title: &str, height: f64) -> String {
    let title = escape(title);
    format!(
        "<figure><figcaption>{title}</figcaption><svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{title}\">"
    )
}

fn close(svg: String) -> String {
    svg + "</svg></figure>"
}

/// One line of text, so that names take the room that they need in whatever font there is.
fn legend<'a>(svg: &mut String, names: impl Iterator<Item = &'a str>, class: char) {
    let _ = write!(svg, "<text x=\"{LEFT}\" y=\"15\">");
    for (index, name) in names.enumerate() {
        let gap = if index == 0 { 0 } else { 16 };
        let _ = write!(
            svg,
            "<tspan class=\"l{class}{index}\" dx=\"{gap}\" font-size=\"15\">■</tspan><tspan dx=\"5\">{}</tspan>",
            escape(name)
        );
    }
    svg.push_str("</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let texts = |scale: Scale, range| scale.ticks(range).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(texts(Scale::Linear, (0.0, 1050.0)), ["0", "200", "400", "600", "800", "1000"]);
        assert_eq!(texts(Scale::Linear, (0.0, 0.31)), ["0", "0.1", "0.2", "0.3"]);
        assert_eq!(texts(Scale::Log, (-0.2, 1.4)), ["1", "2", "5", "10", "20"]);
        assert_eq!(texts(Scale::Log, (-1.1, 3.0)), ["0.1", "1", "10", "100", "1000"]);
        assert_eq!(texts(Scale::Nines, (0.0, 3.0)), ["0 %", "50 %", "90 %", "99 %", "99.9 %"]);
    }

    #[test]
    fn strange_values_and_names_make_a_plot_all_the_same() {
        let axis = Axis { label: "<x>", scale: Scale::Log };
        let odd = Line::new("a<b>&\"", vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, -3.0), (10.0, 5.0)]);
        let svg = lines("t", axis, axis, &[odd]);
        assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("<b>") && !svg.contains("<x>"), "{svg}");
        assert!(lines("t", axis, axis, &[Line::new("n", Vec::new())]).contains("nothing was measured"));
        let one = lines("t", axis, axis, &[Line::new("one", vec![(1.0, 1.0)])]);
        assert!(!one.contains("NaN"), "{one}");
        let bar = Bar { label: "l".into(), parts: vec![2.0, -1.0], mark: Some(7.0), note: "<".into() };
        assert!(!bars("b", &["p"], &[bar]).contains("width=\"-"));
    }
}
