//! Weight-space model merging on the streaming executor, mergekit interchange.
