//! Takes the pictures of the lab for the README: real runs of the built program, in the browser that the tests use.
//!
//! `cargo xtask pictures` runs it. It takes the folder for the pictures, and looks for the program where cargo puts it, beside its own.

#![allow(clippy::unwrap_used, reason = "what goes wrong here ends it, and nobody depends on it")]

#[path = "../tests/browser/browser.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod browser;
#[path = "../tests/browser/lab.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod lab;

use std::path::{Path, PathBuf};

use serde_json::json;

use browser::{Browser, Scheme};
use lab::Lab;

#[tokio::main]
async fn main() {
    let folder = PathBuf::from(std::env::args_os().nth(1).expect("the folder for the pictures"));
    let own = std::env::current_exe().unwrap();
    let lab = Lab::start(&own.parent().unwrap().parent().unwrap().join("sessionctl"), &[]);
    let browser = Browser::open().await;
    let take = async |name: &str, width: u32, most: u64| {
        let path = folder.join(format!("lab-{name}.png"));
        picture(&browser, &path, width, most).await;
        println!("{}", path.display());
    };

    open(&browser, &lab, "/", 1440, Scheme::Light).await;
    run(&browser, "no_lock", "twenty").await;
    take("no-lock-light", 1440, 1300).await;
    browser.be(1440, Scheme::Dark).await;
    take("no-lock-dark", 1440, 1300).await;
    for (strategy, name) in [("exclusive", "exclusive"), ("early_release", "early-release"), ("merge", "merge")] {
        browser.be(1440, Scheme::Light).await;
        run(&browser, strategy, "twenty").await;
        take(&format!("{name}-light"), 1440, 1300).await;
        browser.be(1440, Scheme::Dark).await;
        take(&format!("{name}-dark"), 1440, 1300).await;
    }
    browser.be(1440, Scheme::Light).await;
    run(&browser, "no_lock", "crowd").await;
    take("200-light", 1440, 2200).await;

    open(&browser, &lab, "/compare", 1440, Scheme::Light).await;
    start(&browser, "article").await;
    take("compare-light", 1440, 1700).await;
    browser.be(1440, Scheme::Dark).await;
    take("compare-dark", 1440, 1700).await;

    open(&browser, &lab, "/sessions", 1440, Scheme::Light).await;
    browser.click("#hold").await;
    browser.until("document.querySelector('#locks button')").await;
    take("locks-light", 1440, 900).await;

    open(&browser, &lab, "/", 375, Scheme::Dark).await;
    run(&browser, "no_lock", "twenty").await;
    browser.script("scrollTo(0, document.querySelector('#result').offsetTop - 12)").await;
    let shot = browser.ask("Page.captureScreenshot", json!({"format": "png"})).await;
    std::fs::write(folder.join("lab-phone-dark.png"), from_base64(shot["data"].as_str().unwrap())).unwrap();
    assert_eq!(browser.complaints().await, [""; 0]);
}

async fn open(browser: &Browser, lab: &Lab, path: &str, width: u32, scheme: Scheme) {
    browser.be(width, scheme).await;
    browser.go(&format!("{}{path}", lab.url)).await;
    browser.until("document.body.dataset.ready").await;
}

async fn run(browser: &Browser, strategy: &str, preset: &str) {
    browser.click(&format!("input[value='{strategy}']")).await;
    start(browser, preset).await;
}

async fn start(browser: &Browser, preset: &str) {
    let before = browser.address().await;
    browser.click(&format!("[data-preset='{preset}']")).await;
    browser.until(&format!("location.href !== '{before}'")).await;
    browser.until("document.querySelector('#result').dataset.shows === location.pathname + ' done'").await;
    // Nothing is pointed at, and nothing has the focus.
    browser.script("document.activeElement.blur(); scrollTo(0, 0)").await;
}

/// Writes a picture of the page to a file: from its top, at most this high.
async fn picture(browser: &Browser, path: &Path, width: u32, most: u64) {
    // Nothing is to show that it is pointed at.
    browser.ask("Input.dispatchMouseEvent", json!({"type": "mouseMoved", "x": 0, "y": 0})).await;
    // Colours take a moment to change.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let height = browser.script("return document.documentElement.scrollHeight").await.as_u64().unwrap().min(most);
    let clip = json!({"x": 0, "y": 0, "width": width, "height": height, "scale": 1});
    let how = json!({"format": "png", "captureBeyondViewport": true, "clip": clip});
    let shot = browser.ask("Page.captureScreenshot", how).await;
    std::fs::write(path, from_base64(shot["data"].as_str().unwrap())).unwrap();
}

fn from_base64(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'=').map(digit).collect();
    let bytes = digits.chunks(4).flat_map(|four| {
        let word = four.iter().fold(0u32, |word, digit| word << 6 | u32::from(*digit)) << (6 * (4 - four.len()));
        word.to_be_bytes()[1..four.len()].to_vec()
    });
    bytes.collect()
}
