//! Dates in templates: `strftime` of the request's own time, in UTC, with English names.
//!
//! It refuses to know the clock and the time zone of the machine: every replica writes the same date.

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `format` with the parts of a time in it. A directive that is not known is an error.
pub(super) fn formatted(format: &str, unix_ms: u64) -> Result<String, Error> {
    let seconds = unix_ms / 1000;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let (year, month, day) = civil(days);
    let month_name = name(&MONTHS, month.saturating_sub(1));
    let weekday = name(&WEEKDAYS, days % 7);
    let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
    let half = if hour < 12 { "AM" } else { "PM" };
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            text.push(char);
            continue;
        }
        let directive = chars.next();
        // A sign takes the leading zero away.
        let (padded, directive) = match directive {
            Some('-') => (false, chars.next()),
            directive => (true, directive),
        };
        let two = |number: u64| if padded { format!("{number:02}") } else { number.to_string() };
        text += &match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('H') => two(hour),
            Some('I') => two(twelve),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => half.to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name.chars().take(3).collect(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday.chars().take(3).collect(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let shown = other.map(String::from).unwrap_or_default();
                return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know %{shown}")));
            }
        };
    }
    Ok(text)
}

fn name(names: &[&'static str], number: u64) -> &'static str {
    usize::try_from(number).ok().and_then(|number| names.get(number)).copied().unwrap_or_default()
}

/// Year, month and day of a day after 1970-01-01, by counting four-hundred-year cycles from 1 March 0000
/// (Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (cycle, of_cycle) = (shifted / 146_097, shifted % 146_097);
    let year_of_cycle = (of_cycle - of_cycle / 1460 + of_cycle / 36_524 - of_cycle / 146_096) / 365;
    let of_year = of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    // Months from March, in groups of five that have 153 days.
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = cycle * 400 + year_of_cycle + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (19_782, (2024, 2, 29)),
            (20_785, (2026, 11, 28)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(civil(days), date);
        }
    }

    #[test]
    fn dates_are_written_as_python_writes_them() {
        // 2026-11-28 is a Saturday.
        let now = (20_785 * 86_400 + 13 * 3600 + 5 * 60 + 9) * 1000 + 999;
        let cases = [
            ("%d %b %Y", "28 Nov 2026"),
            ("%A, %B %d, %Y", "Saturday, November 28, 2026"),
            ("%Y-%m-%dT%H:%M:%S%z", "2026-11-28T13:05:09+0000"),
            ("%I:%M %p %%", "01:05 PM %"),
            ("%-I %a %F %T %y %e", "1 Sat 2026-11-28 13:05:09 26 28"),
        ];
        for (format, expected) in cases {
            assert_eq!(formatted(format, now).unwrap(), expected);
        }
        assert!(formatted("%q", now).is_err() && formatted("%", now).is_err());
    }
}
