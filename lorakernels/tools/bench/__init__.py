"""What the layer costs: counted, and measured beside other ways to write it. `lorakernels bench` runs it."""
