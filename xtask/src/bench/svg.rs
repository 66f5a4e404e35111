//! The report as an SVG chart: one chart per metric, one group of bars per size, one bar per monitor.

use super::metric::Metric;
use super::report::Report;
use crate::output::COLOURS;
use std::fmt::Write;

/// In pixels: the widths of the image and of a chart, and the margin.
const WIDTH: usize = 1000;
const CHART: usize = 475;
const EDGE: usize = 20;
/// In pixels: the heights of a bar, of a chart's title and of the name of a size.
const BAR: usize = 15;
const TITLE: usize = 30;
const GROUP: usize = 18;
/// In pixels: the width for a bar's value.
const VALUE: usize = 90;
/// The top of the charts, below title and legend.
const TOP: usize = 100;

/// The image, without external references.
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

/// The bars of one metric, from zero: medians, with lines from the minimum to the maximum.
fn chart(svg: &mut String, report: &Report, metric: Metric, x: usize, top: usize) {
    text(svg, x, top + 18, "font-size=\"14\" font-weight=\"bold\"", &metric.long_title());
    let largest = report.rows.iter().filter(|row| row.metric == metric).map(|row| row.max).max();
    let width = CHART - VALUE - EDGE;
    let length = |value: u64| pixels(value, largest.unwrap_or(0), width);
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

/// Scales a value so that the largest takes `width` pixels.
fn pixels(value: u64, largest: u64, width: usize) -> usize {
    let scaled = u128::from(value) * width as u128 / u128::from(largest.max(1));
    usize::try_from(scaled).unwrap_or(width).min(width)
}

fn colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

fn text(svg: &mut String, x: usize, y: usize, attributes: &str, text_value: &str) {
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" {attributes}>{}</text>", escaped(text_value));
}

/// Escapes text, some of which the user chooses.
fn escaped(text_value: &str) -> String {
    text_value.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    #[test]
    fn bars_are_proportional_to_values() {
        assert_eq!(pixels(5, 10, 300), 150);
        assert_eq!(pixels(10, 10, 300), 300);
        assert_eq!(pixels(0, 0, 300), 0);
        assert_eq!(pixels(20, 10, 300), 300);
    }

    #[test]
    fn an_image_has_every_value_and_is_complete() {
        let svg = picture(&report());
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        for text_value in ["20.000", "100.000", "1.00", "&lt;qemu&gt;: not measured", "the exact lab"] {
            assert!(svg.contains(text_value), "{text_value} in {svg}");
        }
        assert!(!svg.contains("<qemu>"), "names are escaped");
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
