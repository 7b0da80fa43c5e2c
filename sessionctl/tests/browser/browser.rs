//! A browser to look at a page with: Chromium, driven through chromedriver, both from Debian's packages.
//!
//! Nothing here knows which page. What it asks the browser for goes past the page: its scripts need no leave of the page's policy.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thirtyfour::common::capabilities::desiredcapabilities::Capabilities;
use thirtyfour::common::command::Command as DriverCommand;
use thirtyfour::prelude::*;

/// How long a page may take to do what it was told to. A machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser window; it ends with this value.
pub(crate) struct Browser {
    driver: WebDriver,
    session: String,
    chromedriver: Child,
    port: u16,
}

/// A colour scheme that the reader may prefer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Light,
    Dark,
}

impl Browser {
    /// Opens an empty window.
    ///
    /// # Panics
    /// If one of the two programs is missing, with the package that has it.
    pub(crate) async fn open() -> Self {
        let chromium = find("chromium", "chromium");
        let mut chromedriver = Command::new(find("chromedriver", "chromium-driver"))
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(chromedriver.stdout.take().unwrap());
        let port = loop {
            let mut line = String::new();
            assert!(said.read_line(&mut line).unwrap() > 0, "chromedriver ended before it said where it listens");
            if let Some((_, port)) = line.trim().trim_end_matches('.').split_once("successfully on port ") {
                break port.parse().unwrap();
            }
        };
        // Read on, or it would stand still once nobody takes what it says.
        std::thread::spawn(move || said.read_to_end(&mut Vec::new()));
        let root = nix::unistd::Uid::effective().is_root();
        let mut arguments = vec!["--headless=new", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"];
        // Its sandbox refuses to be root.
        arguments.extend(root.then_some("--no-sandbox"));
        let Value::Object(wanted) = json!({
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }) else {
            unreachable!("it is an object")
        };
        let driver = WebDriver::new(format!("http://127.0.0.1:{port}"), Capabilities::from(wanted)).await.unwrap();
        let session = driver.handle().session_id().to_string();
        Self { driver, session, chromedriver, port }
    }

    /// Has the window look like one of this width, for a reader who prefers `scheme`.
    pub(crate) async fn be(&self, width: u32, scheme: Scheme) {
        let size =
            json!({"width": width, "height": if width < 600 { 812 } else { 900 }, "deviceScaleFactor": 1, "mobile": false});
        self.ask("Emulation.setDeviceMetricsOverride", size).await;
        let value = if scheme == Scheme::Light { "light" } else { "dark" };
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": value}]});
        self.ask("Emulation.setEmulatedMedia", features).await;
    }

    pub(crate) async fn go(&self, url: &str) {
        self.driver.goto(url).await.unwrap();
    }

    pub(crate) async fn address(&self) -> String {
        self.driver.current_url().await.unwrap().to_string()
    }

    /// Runs the body of a function, and returns what it returns.
    pub(crate) async fn script(&self, body: &str) -> Value {
        self.driver.execute(body, Vec::new()).await.unwrap_or_else(|error| panic!("{body}: {error}")).json().clone()
    }

    /// Waits until an expression is true.
    pub(crate) async fn until(&self, expression: &str) {
        let end = Instant::now() + PATIENCE;
        while self.script(&format!("return Boolean({expression})")).await != true {
            if Instant::now() > end {
                let text = self.script("return document.body.innerText").await;
                panic!("it never came true: {expression}\n{text}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Clicks where the element is, as a mouse would.
    pub(crate) async fn click(&self, css: &str) {
        let element = self.driver.find(By::Css(css)).await.unwrap_or_else(|error| panic!("{css}: {error}"));
        element.scroll_into_view().await.unwrap();
        element.click().await.unwrap_or_else(|error| panic!("{css}: {error}"));
    }

    /// Replaces what stands in a field.
    pub(crate) async fn write(&self, css: &str, text: &str) {
        let element = self.driver.find(By::Css(css)).await.unwrap();
        element.clear().await.unwrap();
        element.send_keys(text).await.unwrap();
    }

    /// Chooses an option of a list.
    pub(crate) async fn choose(&self, css: &str, value: &str) {
        self.click(&format!("{css} option[value='{value}']")).await;
        assert_eq!(self.script(&format!("return document.querySelector(\"{css}\").value")).await, value);
    }

    /// Returns what can be read there.
    pub(crate) async fn text(&self, css: &str) -> String {
        self.driver.find(By::Css(css)).await.unwrap_or_else(|error| panic!("{css}: {error}")).text().await.unwrap()
    }

    /// Presses keys, wherever the focus is.
    pub(crate) async fn press(&self, keys: impl Into<TypingData>) {
        self.driver.action_chain().send_keys(keys).perform().await.unwrap();
    }

    /// Replaces what stands in the field that has the focus.
    pub(crate) async fn overtype(&self, text: &str) {
        let all = self.driver.action_chain().key_down(Key::Control).key_down('a').key_up('a').key_up(Key::Control);
        all.send_keys(text).perform().await.unwrap();
    }

    /// Returns what a page, its policy or the browser complained about since the last time.
    pub(crate) async fn complaints(&self) -> Vec<String> {
        self.log("browser").await.iter().map(|entry| entry["message"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Returns the addresses that were asked for since the last time, by whatever part of the page.
    pub(crate) async fn requests(&self) -> Vec<String> {
        let mut requests = Vec::new();
        for entry in self.log("performance").await {
            let message: Value = serde_json::from_str(entry["message"].as_str().unwrap()).unwrap();
            if message["message"]["method"] == "Network.requestWillBeSent" {
                requests.push(message["message"]["params"]["request"]["url"].as_str().unwrap().to_owned());
            }
        }
        requests
    }

    async fn log(&self, kind: &str) -> Vec<Value> {
        self.driver.handle().cmd(DriverCommand::GetLog(kind.into())).await.unwrap().value().unwrap()
    }

    /// Asks the browser itself, in the terms of its developer tools.
    pub(crate) async fn ask(&self, what: &str, how: Value) -> Value {
        self.driver.cdp().send_raw(what, how).await.unwrap_or_else(|error| panic!("{what}: {error}"))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Also while a test unwinds, when nothing can be awaited: Chromium ends with its session, and not with chromedriver.
        let end = || -> std::io::Result<()> {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            write!(stream, "DELETE /session/{} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", self.session)?;
            // It answers when the browser has ended, and keeps the connection.
            stream.read(&mut [0; 64]).map(drop)
        };
        let _ = end();
        let _ = self.chromedriver.kill();
        let _ = self.chromedriver.wait();
    }
}

fn find(name: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|place| place.join(name)).find(|path| path.is_file());
    found
        .unwrap_or_else(|| panic!("{name} is missing; on Debian it is in the package {package} (apt-get install {package})"))
}
