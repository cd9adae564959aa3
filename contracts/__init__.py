"""What passes between the rooms: configs, URIs, Parquet schemas, data sets, runs and pages."""
