//! Layer drop and elastic networks.
