"""Container images on this node: fetched by skopeo and unpacked once, kept while an allocation needs them."""
