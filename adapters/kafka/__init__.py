"""Apache Kafka: clients of any cluster, the topics' administration, and a broker of our own for development."""
