//! An application's own struct as (a part of) the session.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Result;
use crate::session::Session;
use crate::view::SessionView;

/// A struct that is kept in the session, whole, under one key: handlers ask for `Session<Cart>` and `SessionView<Cart>`.
///
/// Where there is none yet, it is the [`Default`]. Several of them share one session, each under its own key; in a
/// [merge](crate::Mode::merge) each is a unit.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use session_web::{Result, Session, SessionView, Typed};
///
/// #[derive(Default, Deserialize, Serialize)]
/// struct Cart {
///     items: Vec<String>,
/// }
///
/// impl Typed for Cart {
///     const KEY: &'static str = "cart";
/// }
///
/// async fn add(session: Session<Cart>) -> Result<String> {
///     let cart = session.update(|cart| cart.items.push("tea".into())).await?;
///     Ok(format!("{} in the cart", cart.items.len()))
/// }
///
/// async fn badge(view: SessionView<Cart>) -> Result<String> {
///     Ok(view.get().await?.items.len().to_string())
/// }
/// ```
pub trait Typed: Serialize + DeserializeOwned + Default + Send + Sync + 'static {
    /// The key that it is kept under.
    const KEY: &'static str;
}

impl<T: Typed> Session<T> {
    /// Returns what is stored, or the default.
    ///
    /// # Errors
    /// Those of opening the session; [`Corrupt`](session_core::ErrorKind::Corrupt) if what is stored is not a `T`.
    pub async fn get(&self) -> Result<T> {
        let value = self.read(|session| session.get(T::KEY), |view| view.get(T::KEY)).await?;
        Ok(value.unwrap_or_default())
    }

    /// Stores `value` with the session.
    ///
    /// # Errors
    /// Those of opening the session; [`Config`](session_core::ErrorKind::Config) if the codec cannot express the value.
    pub async fn set(&self, value: &T) -> Result<()> {
        self.write(|session| session.insert(T::KEY, value)).await
    }

    /// Changes what is stored and returns it. In a [merge](crate::Mode::merge) the change is made again on the newest value if
    /// somebody else was faster, so it should have no other effect.
    ///
    /// # Errors
    /// As [`get`](Self::get) and [`set`](Self::set).
    pub async fn update(&self, change: impl Fn(&mut T) + Send + Sync + 'static) -> Result<T> {
        self.write(|session| {
            session.update_key(T::KEY, move |value: Option<T>| {
                let mut value = value.unwrap_or_default();
                change(&mut value);
                value
            })?;
            Ok(session.get(T::KEY)?.unwrap_or_default())
        })
        .await
    }
}

impl<T: Typed> SessionView<T> {
    /// Returns what is stored, or the default.
    ///
    /// # Errors
    /// Those of reading the session; [`Corrupt`](session_core::ErrorKind::Corrupt) if what is stored is not a `T`.
    pub async fn get(&self) -> Result<T> {
        Ok(self.read(|view| view.get(T::KEY)).await?.unwrap_or_default())
    }
}
