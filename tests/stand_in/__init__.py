"""A GPU that is none: what runs on a device, without a device, and fails where a device would go wrong silently."""
