"""The wire format: `.proto` files and the modules that `make protos` generates from them."""
