//! The same as a picture: one chart per metric, one group of bars per size, one bar per monitor.

use super::metric::Metric;
use super::report::Report;
use crate::output::COLOURS;
use std::fmt::Write;

/// Pixels: the picture's width, a chart's, and the edges around everything.
const WIDTH: usize = 1000;
const CHART: usize = 475;
const EDGE: usize = 20;
/// Pixels that a bar takes, the title of a chart, and the name of a size.
const BAR: usize = 15;
const TITLE: usize = 30;
const GROUP: usize = 18;
/// Pixels beside a bar for its value.
const VALUE: usize = 90;
/// Where the charts begin, below title and legend.
const TOP: usize = 100;

/// The picture, which needs nothing else to be shown.
pub(super) fn picture(report: &Report) -> String {
    let metrics: Vec<Metric> = Metric::all(report.scenario)
        .filter(|metric| report.rows.iter().any(|row| row.metric == *metric))
        .collect();
    let height = TITLE + report.cases().len() * (GROUP + BAR * report.vmms().len()) + EDGE;
    let total = TOP + metrics.len().div_ceil(2) * height;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{total}\" \
         viewBox=\"0 0 {WIDTH} {total}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{total}\" fill=\"white\"/>\n"
    );
    heading(&mut svg, report);
    for (number, metric) in metrics.into_iter().enumerate() {
        let (column, line) = (number % 2, number / 2);
        chart(&mut svg, report, metric, EDGE + column * CHART, TOP + line * height);
    }
    svg.push_str("</svg>\n");
    svg
}

fn heading(svg: &mut String, report: &Report) {
    let host = &report.host;
    text(
        svg,
        EDGE,
        28,
        "font-size=\"18\" font-weight=\"bold\"",
        &format!("kindling bench: {}", report.scenario.name()),
    );
    text(svg, EDGE, 46, "fill=\"#555\"", &format!("measured in {}", host.meaning));
    text(svg, EDGE, 62, "fill=\"#555\"", &format!("on {}", host.machine));
    let mut x = EDGE;
    for (number, vmm) in report.vmms().into_iter().enumerate() {
        let colour = colour(number);
        let _ = writeln!(svg, "<rect x=\"{x}\" y=\"73\" width=\"11\" height=\"11\" fill=\"{colour}\"/>");
        text(svg, x + 16, 83, "", vmm);
        x += 40 + 7 * vmm.chars().count();
    }
}

/// Bars of one metric, from zero, medians with lines from the smallest to the largest value.
fn chart(svg: &mut String, report: &Report, metric: Metric, x: usize, top: usize) {
    text(svg, x, top + 18, "font-size=\"14\" font-weight=\"bold\"", &metric.long_title());
    let largest = report.rows.iter().filter(|row| row.metric == metric).map(|row| row.max).max();
    let room = CHART - VALUE - EDGE;
    let length = |value: u64| pixels(value, largest.unwrap_or(0), room);
    let mut y = top + TITLE;
    for case in report.cases() {
        text(svg, x, y + 11, "fill=\"#555\"", &case.to_string());
        y += GROUP;
        for (number, vmm) in report.vmms().into_iter().enumerate() {
            if let Some(row) = report.row(case, vmm, metric) {
                let (bar, middle) = (length(row.median), y + BAR / 2 - 1);
                let (from, to) = (x + length(row.min), x + length(row.max));
                let (colour, height) = (colour(number), BAR - 3);
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{bar}\" height=\"{height}\" fill=\"{colour}\"/>\
                     <path d=\"M{from} {middle}H{to}\" stroke=\"black\"/>"
                );
                text(svg, to.max(x + bar) + 5, y + 10, "", &metric.show(row.median));
            } else {
                text(svg, x, y + 10, "fill=\"#999\"", &format!("{vmm}: not measured"));
            }
            y += BAR;
        }
    }
}

/// A value's part of the room that the largest one takes whole.
fn pixels(value: u64, largest: u64, room: usize) -> usize {
    let scaled = u128::from(value) * room as u128 / u128::from(largest.max(1));
    usize::try_from(scaled).unwrap_or(room).min(room)
}

fn colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

fn text(svg: &mut String, x: usize, y: usize, attributes: &str, words: &str) {
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" {attributes}>{}</text>", escaped(words));
}

/// A user chooses some of the words.
fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    #[test]
    fn bars_are_in_proportion() {
        assert_eq!(pixels(5, 10, 300), 150);
        assert_eq!(pixels(10, 10, 300), 300);
        assert_eq!(pixels(0, 0, 300), 0);
        assert_eq!(pixels(20, 10, 300), 300);
    }

    #[test]
    fn a_picture_has_every_value_and_is_whole() {
        let svg = picture(&report());
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        for words in ["20.000", "100.000", "1.00", "&lt;qemu&gt;: not measured", "the exact lab"] {
            assert!(svg.contains(words), "{words} in {svg}");
        }
        assert!(!svg.contains("<qemu>"), "names are escaped");
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
