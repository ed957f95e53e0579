"""Container images on this node: fetched by skopeo, unpacked by umoci once, kept while an allocation needs them."""
