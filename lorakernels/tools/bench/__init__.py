"""What the layer costs: by formula, and measured beside other ways to write it. `lorakernels bench` runs it."""
