//! Which cookies there are: presets, prefixes, sizes, ages.

use std::time::Duration;

use proptest::prelude::*;
use session_core::ErrorKind;
use session_web::{CookieKeys, SameSite, SessionCookie, SessionCookieBuilder};

use super::support::*;

/// What a browser is told by a cookie, without the value: name first, then the attributes in alphabetical order.
async fn written(cookie: SessionCookieBuilder) -> String {
    let url = serve_with(cookie.build().unwrap()).await;
    let response = bare().post(format!("{url}/count")).send().await.unwrap();
    let cookie = set_cookie(response.headers());
    let mut parts: Vec<_> = cookie.split("; ").map(str::to_owned).collect();
    let name = parts.remove(0).split('=').next().unwrap().to_owned();
    parts.sort();
    format!("{name}; {}", parts.join("; "))
}

fn refusal(cookie: SessionCookieBuilder) -> String {
    let error = cookie.build().expect_err("a browser would refuse it");
    assert_eq!(error.kind(), ErrorKind::Config);
    error.to_string()
}

#[tokio::test]
async fn s_13_each_preset_has_its_attributes_and_nothing_is_weak_by_default() {
    let expected = [
        (SessionCookie::named(SessionCookie::default().name()), "__Host-sid; HttpOnly; Path=/; SameSite=Lax; Secure"),
        (SessionCookie::strict(), "__Host-sid; HttpOnly; Path=/; SameSite=Strict; Secure"),
        (SessionCookie::embedded(), "__Host-sid; HttpOnly; Partitioned; Path=/; SameSite=None; Secure"),
        (SessionCookie::php(), "PHPSESSID; HttpOnly; Path=/; SameSite=Lax; Secure"),
        (SessionCookie::development(), "sid; HttpOnly; Path=/; SameSite=Lax"),
        (
            SessionCookie::named("__Secure-a").domain("example.com"),
            "__Secure-a; Domain=example.com; HttpOnly; Path=/; SameSite=Lax; Secure",
        ),
        (SessionCookie::named("a").readable_by_scripts().path("/b"), "a; Path=/b; SameSite=Lax; Secure"),
        (
            SessionCookie::strict().max_age(Duration::from_secs(60)),
            "__Host-sid; HttpOnly; Max-Age=60; Path=/; SameSite=Strict; Secure",
        ),
    ];
    for (cookie, expected) in expected {
        assert_eq!(written(cookie).await, expected);
    }
    // Without anything being said at all.
    let url = serve(app(session_web::SessionLayer::new(sessions()))).await;
    let response = bare().post(format!("{url}/count")).send().await.unwrap();
    let cookie = set_cookie(response.headers());
    let (value, attributes) = cookie.split_once("; ").unwrap();
    assert!(value.starts_with("__Host-sid="), "{value}");
    assert_eq!(attributes, "HttpOnly; SameSite=Lax; Secure; Path=/");
    assert!(
        refusal(SessionCookie::named("a").same_site(SameSite::None).insecure()).contains("SameSite=None must be Secure")
    );
}

#[tokio::test]
async fn s_13_a_logout_takes_the_cookie_away_with_the_attributes_that_it_was_set_with() {
    let url = serve_with(SessionCookie::embedded().max_age(Duration::from_secs(60)).build().unwrap()).await;
    let id = begin(&url).await;
    let request = bare().post(format!("{url}/logout")).header("cookie", format!("{NAME}={}", id.as_str()));
    let cookie = set_cookie(request.send().await.unwrap().headers());
    let mut parts: Vec<_> = cookie.split("; ").collect();
    parts.sort_unstable();
    let expired = "Expires=Thu, 01 Jan 1970 00:00:00 GMT";
    assert_eq!(parts, [expired, "HttpOnly", "Max-Age=0", "Partitioned", "Path=/", "SameSite=None", "Secure", "__Host-sid="]);
}

#[test]
fn s_14_every_prefix_asks_for_its_attributes_when_the_cookie_is_made() {
    type Change = fn(SessionCookieBuilder) -> SessionCookieBuilder;
    let changes: [(&str, Change); 4] = [
        ("must be Secure", |cookie| cookie.insecure()),
        ("must have no Domain", |cookie| cookie.domain("example.com")),
        ("must have Path=/", |cookie| cookie.path("/app")),
        ("must be HttpOnly", |cookie| cookie.readable_by_scripts()),
    ];
    let rules = [
        ("__Secure-sid", [true, false, false, false]),
        ("__Host-sid", [true, true, true, false]),
        ("__Http-sid", [true, false, false, true]),
        ("__Host-Http-sid", [true, true, true, true]),
    ];
    for (name, refused) in rules {
        assert!(SessionCookie::named(name).build().is_ok(), "{name}");
        for ((rule, change), refused) in changes.iter().zip(refused) {
            let changed = change(SessionCookie::named(name));
            if refused {
                let text = refusal(changed);
                assert!(text.contains(rule) && text.contains(&name[..name.len() - 3]), "{name}: {text}");
            } else {
                assert!(changed.build().is_ok(), "{name} needs not keep: {rule}");
            }
        }
        // Browsers compare them without regard to case, servers that look for them do not.
        for misspelt in [name.to_lowercase(), name.to_uppercase(), name.replace("_H", "_h")] {
            if misspelt != name {
                assert!(refusal(SessionCookie::named(misspelt.clone())).contains("write it like that"), "{misspelt}");
            }
        }
    }
    for name in ["", "a b", "a=b", "a;b", "a,b", "a\"b", "a\r\nb", "ä", "a\0", "(a)", "a/b", "[a]"] {
        assert!(refusal(SessionCookie::named(name)).contains("is no name"), "{name:?}");
    }
    for path in ["", "app", "/a;b", "/a\r\nSet-Cookie: b=c", "/ä"] {
        assert!(refusal(SessionCookie::named("a").path(path)).contains("Path must"), "{path:?}");
    }
    for domain in ["", "a b", "a;b", "a\r\n"] {
        assert!(refusal(SessionCookie::named("a").domain(domain)).contains("Domain must"), "{domain:?}");
    }
}

#[test]
fn s_17_partitioned_asks_for_secure_and_for_every_site() {
    let partitioned = || SessionCookie::named("a").partitioned();
    for (cookie, good) in [
        (partitioned().same_site(SameSite::None), true),
        (partitioned(), false),
        (partitioned().same_site(SameSite::Strict), false),
        (partitioned().same_site(SameSite::Lax), false),
        (partitioned().insecure(), false),
    ] {
        match good {
            true => assert!(cookie.build().is_ok()),
            false => assert!(refusal(cookie).contains("Partitioned must be Secure and SameSite=None")),
        }
    }
    // Not asked for, not there.
    let plain = SessionCookie::named("a").same_site(SameSite::None).build().unwrap();
    assert!(!format!("{plain:?}").contains("Partitioned"));
}

#[tokio::test]
async fn s_20_a_cookie_that_browsers_drop_is_refused_when_it_is_made() {
    let keys = || CookieKeys::new((0..64).collect::<Vec<u8>>()).unwrap();
    let named = |length: usize| SessionCookie::named("n".repeat(length));
    for (longest, cookie) in [
        (256, SessionCookie::named as fn(String) -> _),
        (256 + 65, |name| SessionCookie::named(name).signed(CookieKeys::new((0..64).collect::<Vec<u8>>()).unwrap())),
    ] {
        assert!(cookie("n".repeat(4096 - longest)).build().is_ok());
        assert!(refusal(cookie("n".repeat(4097 - longest))).contains("browsers drop a cookie of more than 4096"));
    }
    assert!(named(1).path(format!("/{}", "p".repeat(1023))).build().is_ok());
    assert!(refusal(named(1).path(format!("/{}", "p".repeat(1024)))).contains("1,024"));
    // What is handed out keeps within it.
    for cookie in [named(4096 - 256), named(4096 - 2 * (24 + 256 + 16)).encrypted(keys())] {
        let url = serve_with(cookie.build().unwrap()).await;
        let response = bare().post(format!("{url}/count")).send().await.unwrap();
        let pair = set_cookie(response.headers()).split("; ").next().unwrap().to_owned();
        assert!(pair.len() - 1 <= 4096, "{} bytes", pair.len());
    }
}

fn max_age(cookie: &SessionCookie) -> i64 {
    let text = format!("{cookie:?}");
    let age = text.split("Max-Age=").nth(1).unwrap();
    age[..age.find(|c: char| !c.is_ascii_digit()).unwrap()].parse().unwrap()
}

proptest! {
    #[test]
    fn s_21_no_cookie_lives_longer_than_400_days(seconds in any::<i64>()) {
        let age = Duration::from_secs(seconds.unsigned_abs());
        let cookie = SessionCookie::strict().max_age(age).build();
        match seconds {
            0 => prop_assert!(cookie.is_err()),
            _ => prop_assert_eq!(max_age(&cookie.unwrap()), i64::try_from(seconds.unsigned_abs().min(400 * 86_400)).unwrap()),
        }
    }
}

#[test]
fn s_21_the_edges_of_an_age_are_clamped_or_refused() {
    for (age, expected) in [(1, 1), (400 * 86_400, 34_560_000), (400 * 86_400 + 1, 34_560_000), (u64::MAX, 34_560_000)] {
        assert_eq!(max_age(&SessionCookie::strict().max_age(Duration::from_secs(age)).build().unwrap()), expected);
    }
    for age in [Duration::ZERO, Duration::from_millis(999)] {
        assert!(refusal(SessionCookie::strict().max_age(age)).contains("at least a second"));
    }
}
