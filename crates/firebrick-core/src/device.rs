//! Picking a device by name, and saying which ones there are.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;
#[cfg(feature = "wgpu")]
use burn::tensor::DeviceKind;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use burn::tensor::DeviceType;
use serde::{Deserialize, Serialize};

/// A device, as named on a command line: `auto`, `flex`, `wgpu`, `wgpu:1`, `cuda`, `cuda:1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceSpec {
    /// The first CUDA device, else the first wgpu adapter that is not a software rasterizer, else flex.
    #[default]
    Auto,
    /// burn's CPU backend.
    Flex,
    /// The n-th wgpu adapter, from 0, in the order of [`list_devices`].
    Wgpu(usize),
    /// The n-th CUDA device, from 0.
    Cuda(usize),
}

/// A device that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceInfo {
    /// How to name it.
    pub spec: DeviceSpec,
    /// What it calls itself, such as `NVIDIA H100 PCIe`.
    pub name: String,
    /// `cpu`, `discrete gpu`, `integrated gpu`, `virtual gpu`, `cuda gpu` or `other`.
    pub kind: &'static str,
    /// Whether it is a GPU in name only: a software rasterizer, for checks of correctness.
    pub software: bool,
}

/// A device cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Not the name of a device.
    #[error("`{0}` is not a device; write auto, flex, wgpu, wgpu:N, cuda or cuda:N")]
    Unknown(String),
    /// This build does not know the device.
    #[error("{spec} is not in this build; build with `--features {feature}`")]
    NotBuilt {
        /// What was asked for.
        spec: DeviceSpec,
        /// The cargo feature that brings it.
        feature: &'static str,
    },
    /// There is no such device.
    #[error("there is no {spec}; found: {}", names(found))]
    NotFound {
        /// What was asked for.
        spec: DeviceSpec,
        /// What there is; only listed, not opened.
        found: Vec<DeviceInfo>,
    },
    /// The device is listed, but its driver refuses to open it.
    #[error("{spec} does not open: {reason}")]
    DoesNotOpen {
        /// What was asked for.
        spec: DeviceSpec,
        /// What the driver said.
        reason: String,
    },
}

fn names(found: &[DeviceInfo]) -> String {
    let name = |d: &DeviceInfo| format!("{} ({})", d.spec, if d.software { "software" } else { d.kind });
    found.iter().map(name).collect::<Vec<_>>().join(", ")
}

impl FromStr for DeviceSpec {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown(text.to_string());
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number.parse::<usize>().map_err(|_| unknown())?)),
            None => (text, None),
        };
        match (name, number) {
            ("auto", None) => Ok(DeviceSpec::Auto),
            ("flex", None) => Ok(DeviceSpec::Flex),
            ("wgpu", n) => Ok(DeviceSpec::Wgpu(n.unwrap_or(0))),
            ("cuda", n) => Ok(DeviceSpec::Cuda(n.unwrap_or(0))),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::Auto => f.write_str("auto"),
            DeviceSpec::Flex => f.write_str("flex"),
            DeviceSpec::Wgpu(n) => write!(f, "wgpu:{n}"),
            DeviceSpec::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl Serialize for DeviceSpec {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceSpec {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl DeviceSpec {
    /// The device, ready for tensors. [`DeviceSpec::Auto`] always finds one.
    ///
    /// # Errors
    /// If this build does not know the device, if there is none of this number, or if its driver refuses to open it.
    pub fn open(&self) -> Result<Device, DeviceError> {
        match self {
            DeviceSpec::Flex => Ok(Device::flex()),
            DeviceSpec::Auto => {
                let real =
                    found().into_iter().filter(|(info, _)| !info.software && info.spec != DeviceSpec::Flex);
                let mut opened = real.filter(|(_, device)| opened_name(device).is_ok());
                Ok(opened.next().map_or_else(Device::flex, |(_, device)| device))
            }
            DeviceSpec::Wgpu(_) if !cfg!(feature = "wgpu") => {
                Err(DeviceError::NotBuilt { spec: *self, feature: "wgpu" })
            }
            DeviceSpec::Cuda(_) if !cfg!(feature = "cuda") => {
                Err(DeviceError::NotBuilt { spec: *self, feature: "cuda" })
            }
            spec => {
                let found = found();
                match found.iter().find(|(info, _)| info.spec == *spec) {
                    None => {
                        let found = found.into_iter().map(|(info, _)| info).collect();
                        Err(DeviceError::NotFound { spec: *spec, found })
                    }
                    Some((_, device)) => match opened_name(device) {
                        Ok(_) => Ok(device.clone()),
                        Err(reason) => Err(DeviceError::DoesNotOpen { spec: *spec, reason }),
                    },
                }
            }
        }
    }
}

/// Every device this build can reach, the order in which [`DeviceSpec::Auto`] prefers them. Opens each to ask its name.
pub fn list_devices() -> Vec<DeviceInfo> {
    let named = |(mut info, device): (DeviceInfo, Device)| {
        match opened_name(&device) {
            Ok(Some(name)) => info.name = name,
            Ok(None) => {}
            Err(reason) => info.name = format!("does not open: {reason}"),
        }
        info
    };
    found().into_iter().map(named).collect()
}

/// The devices of this build, without opening them; flex is the last.
fn found() -> Vec<(DeviceInfo, Device)> {
    let mut found = gpus();
    found.push((info(DeviceSpec::Flex, "cpu", false), Device::flex()));
    found
}

#[allow(unused_mut)] // Without GPU features there is nothing to add.
fn gpus() -> Vec<(DeviceInfo, Device)> {
    let mut found: Vec<(DeviceInfo, Device)> = Vec::new();
    #[cfg(feature = "cuda")]
    for (n, device) in Device::enumerate(DeviceType::Cuda).into_iter().enumerate() {
        found.push((info(DeviceSpec::Cuda(n), "cuda gpu", false), device));
    }
    #[cfg(feature = "wgpu")]
    {
        let adapters = Device::enumerate(DeviceType::Wgpu);
        let count = adapters.len();
        for (n, device) in adapters.into_iter().enumerate() {
            let kind = adapter_kind(&device, count);
            found.push((info(DeviceSpec::Wgpu(n), kind, kind == "cpu"), device));
        }
    }
    found
}

fn info(spec: DeviceSpec, kind: &'static str, software: bool) -> DeviceInfo {
    DeviceInfo { spec, name: format!("{spec} ({kind})"), kind, software }
}

/// The kind of one of `count` adapters; a device tells it only by being equal to a device of that kind.
#[cfg(feature = "wgpu")]
fn adapter_kind(device: &Device, count: usize) -> &'static str {
    let is = |kind: DeviceKind| *device == Device::wgpu(kind);
    if is(DeviceKind::Cpu) {
        return "cpu";
    }
    (0..count)
        .find_map(|i| {
            let discrete = is(DeviceKind::DiscreteGpu(i)).then_some("discrete gpu");
            let integrated = || is(DeviceKind::IntegratedGpu(i)).then_some("integrated gpu");
            discrete.or_else(integrated).or_else(|| is(DeviceKind::VirtualGpu(i)).then_some("virtual gpu"))
        })
        .unwrap_or("other")
}

/// Opens a device and returns what it calls itself, or what the driver said.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn opened_name(device: &Device) -> Result<Option<String>, String> {
    // A driver that fails to come up panics inside the runtime.
    let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| device.identity()));
    asked.map(|identity| identity.map(|i| i.name)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("the driver failed").to_string()
    })
}

#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
fn opened_name(_device: &Device) -> Result<Option<String>, String> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Tensor;

    #[test]
    fn names_round_trip() {
        let specs = [
            DeviceSpec::Auto,
            DeviceSpec::Flex,
            DeviceSpec::Wgpu(0),
            DeviceSpec::Wgpu(3),
            DeviceSpec::Cuda(1),
        ];
        for spec in specs {
            assert_eq!(spec.to_string().parse(), Ok(spec));
            let json = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<DeviceSpec>(&json).unwrap(), spec);
        }
        assert_eq!("cuda".parse(), Ok(DeviceSpec::Cuda(0)));
        for bad in ["", "gpu", "flex:0", "auto:1", "cuda:", "cuda:-1", "wgpu:x", "CUDA", "cuda:1:2"] {
            assert_eq!(bad.parse::<DeviceSpec>(), Err(DeviceError::Unknown(bad.to_string())));
        }
    }

    #[test]
    fn flex_and_auto_compute() {
        for spec in [DeviceSpec::Flex, DeviceSpec::Auto] {
            let device = spec.open().unwrap();
            assert_eq!(Tensor::<1>::ones([3], &device).sum().into_scalar::<f32>(), 3.0);
        }
    }

    #[test]
    fn missing_devices_are_errors_with_advice() {
        let error = DeviceSpec::Cuda(99).open().unwrap_err().to_string();
        let advice = if cfg!(feature = "cuda") { "flex (cpu)" } else { "--features cuda" };
        assert!(error.contains("cuda:99") && error.contains(advice), "{error}");
        let error = DeviceSpec::Wgpu(99).open().unwrap_err().to_string();
        let advice = if cfg!(feature = "wgpu") { "flex (cpu)" } else { "--features wgpu" };
        assert!(error.contains("wgpu:99") && error.contains(advice), "{error}");
    }

    #[test]
    fn every_listed_device_has_a_spec_of_its_own() {
        let devices = list_devices();
        assert_eq!(devices.last().map(|d| d.spec), Some(DeviceSpec::Flex));
        for (i, device) in devices.iter().enumerate() {
            assert!(devices[..i].iter().all(|other| other.spec != device.spec));
        }
    }
}
